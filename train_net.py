#!/usr/bin/env python
"""Train and evaluate PANet, or any other model that Detectron2 builds from a config."""

import sys

from panet_d2.engine.main import main

if __name__ == "__main__":
    sys.exit(main())
