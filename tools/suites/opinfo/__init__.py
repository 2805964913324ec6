"""PyTorch's OpInfo: the rules of axes, costs and placements, checked on the sample inputs of every operator."""

from tools.suites.opinfo.suite import SUITE as SUITE
