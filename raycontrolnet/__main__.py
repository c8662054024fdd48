import sys

from raycontrolnet.cli import main

sys.exit(main())
