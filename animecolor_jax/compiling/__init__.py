"""The programs of training and colouring, compiled for devices that this computer does not have."""
