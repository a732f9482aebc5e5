import sys

from nvlm_runtime.cli import main

sys.exit(main())
