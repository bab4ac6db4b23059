"""The one exception class for faults in what a caller gave."""


class InputError(ValueError):
  """Bad input: the message is one line that names the fault and the remedy.

  The command line prints it without a traceback and exits with 2; a library
  caller can catch it as the `ValueError` that it is.
  """
