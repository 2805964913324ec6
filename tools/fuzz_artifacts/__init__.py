"""Mutates artifacts in thousands of ways, recomputes their hashes as an attacker would, and checks loading and calling.

A mutated artifact must be refused with a LissomError of one sentence, or load. A call of a loaded one may return the same
outputs bit for bit, return others, as another program or other weights do, be refused, or raise from one of its operators.
Anything else is a fault: a signal, a timeout, another exception, unbounded memory, text of a file in source that is compiled,
a process, socket or file that is opened, a change of PyTorch's random state or settings, or printed output.
"""
