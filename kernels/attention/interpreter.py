"""A repair to Triton's CPU interpreter, imported under TRITON_INTERPRET=1 only.

Triton up to 3.6 turns a loop bound, an array of one element, into an int in a way that numpy 2.4 and later refuse (triton issue 9171).
"""

import triton
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


if tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 6):
    interpreter._patch_lang_tensor = _patch_tensor_and_index
