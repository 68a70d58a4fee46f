"""Imported first, while the other imports take their seconds: Ctrl-C ends the script as the system does, untraced."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
    signal.signal(signal.SIGINT, signal.SIG_DFL)
