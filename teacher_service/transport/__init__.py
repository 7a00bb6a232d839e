"""Bodies and answers on the wire: bounded, timed, streamed; connections counted."""
