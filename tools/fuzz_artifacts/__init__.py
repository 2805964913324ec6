"""Changes artifacts in thousands of ways, seals them anew as an attacker would, and looks at what loading and calling does.

A changed artifact must be refused with a LissomError of one sentence, or load. What loads may be called: it answers as before,
bit for bit; it answers something else, as another program or other weights do; it is refused; or one of its operators raises.
Anything else is a fault: a signal, no answer in time, another exception, memory without bounds, text of a file in source that
is compiled, a process, socket or file that is opened, random state or settings of PyTorch that change, something printed.
"""
