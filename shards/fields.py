"""The two kinds of recipe fields.

A field is *method* unless it is marked `Operation[...]`: method fields decide what is computed and
must match to resume; operation fields are free to change at every start.
"""

from typing import Annotated, TypeVar

_T = TypeVar("_T")

OPERATION = "operation"
Operation = Annotated[_T, OPERATION]
