"""dclr: self-supervised video representation learning by dual contrastive learning (DCLR, ACM MM 2022)."""

import os

# torch's C++ code prints 20 lines of addresses when a connection to another rank ends. Our one line says which rank
# failed. torch reads the variable when it is first imported.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
