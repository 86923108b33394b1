"""Run a network on the hardware: one protocol, an engine for the CPU and one for whatever Keras can use."""
