"""OpenVINO: programs as its IR, compiled for a CPU; which layers it runs in integers, and checks of IR from artifacts."""
