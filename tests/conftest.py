import torch
from jaxtyping import install_import_hook

# Every annotated shape and type of the package is checked while the tests run.
install_import_hook("shine", "shape_check.check")
torch.set_num_threads(1)
