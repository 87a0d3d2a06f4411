"""The package imports cheaply and says its version."""

import subprocess
import sys


def test_import_is_cheap():
    code = "import undertow, sys; assert undertow.__version__; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
