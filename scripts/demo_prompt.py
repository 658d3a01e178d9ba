"""Print the prompt of `make demo`: a standard library file that the model was not trained on, cut in the middle."""

import copyreg
import inspect

source = inspect.getsource(copyreg)
cut = "def remove_extension(module, name, code):\n"
head, found, _ = source.partition(cut)
print(f"# file: copyreg.py\n{head}{found}", end="")
