#!/usr/bin/env python
"""
Prepare the nuclei of configs/DSB2018: download stage1_train.zip of BBBC038v1 from
https://bbbc.broadinstitute.org/BBBC038 (CC0), and name it here.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import List, Optional

from panet_d2.data import DataError
from panet_d2.data.datasets.dsb2018 import prepare_dsb2018


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="stage1_train.zip, or the folder that it was unpacked into")
    parser.add_argument(
        "--root",
        default=os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")),
        help="folder of the data sets, in which dsb2018 is made; DETECTRON2_DATASETS by default",
    )
    args = parser.parse_args(argv)
    try:
        for split, (images, nuclei) in prepare_dsb2018(args.source, args.root).items():
            print(f"dsb2018_{split}: {images} images, {nuclei} nuclei")
    except (DataError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
