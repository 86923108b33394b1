"""The engines that run networks: their protocol in `base`, one for CPUs, one for whatever Keras can use."""
