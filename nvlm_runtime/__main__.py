import sys

from nvlm_runtime.commands.cli import main

sys.exit(main())
