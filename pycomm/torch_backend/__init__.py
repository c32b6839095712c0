"""pycomm as a backend of ``torch.distributed``: ``init_process_group("pycomm")``.

``import torch`` makes the name known (see ``pycomm_launch.autoload``); this package is imported
when the first group is made. Where that hook does not run (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``),
importing this package does the same.
"""

from pycomm import end_of_backward
from pycomm.torch_backend import backward, process_group, work
from pycomm.torch_backend.compiler import keep_from_compiler
from pycomm.torch_backend.process_group import ProcessGroup, create_process_group
from pycomm.torch_backend.reducer import keep_works_of_forward
from pycomm_launch.autoload import autoload

__all__ = ["ProcessGroup", "create_process_group"]

keep_from_compiler(backward, end_of_backward, process_group, work)
keep_works_of_forward()
autoload()
