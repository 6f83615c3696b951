"""Train a GPT on Shakespeare, on this machine's CPU: all arithmetic is numpy and numba.

    python examples/train_shakespeare.py                     the best text that a minute buys on two cores
    python examples/train_shakespeare.py --recipe classic    nanoGPT's recipe for a CPU
    python examples/train_shakespeare.py --recipe lecture    the lecture's scaled-up GPT, many hours
    python examples/train_shakespeare.py --data my.txt --layers 6 --steps 5000
    python examples/train_shakespeare.py --minutes 5         the same schedule in five minutes
    python examples/train_shakespeare.py --resume            go on where it was stopped, or killed

The loop is in gpt/train.py, the model in gpt/model.py, all options in --help.
"""
import sys

from gpt.command import main

if __name__ == "__main__":
    sys.exit(main())
