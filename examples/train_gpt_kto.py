"""KTO training as a script, for launchers that want a file: the same program as `nemo-kto train`.

torchrun --nproc-per-node 8 examples/train_gpt_kto.py layout=8gpu pretrained_checkpoint.restore_from_path=MODEL ...
"""

import sys

from nemo_kto.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
