"""The engines that run networks: their protocol in `base`, OpenVINO for CPUs, and Keras for its other devices."""
