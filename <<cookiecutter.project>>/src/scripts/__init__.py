"""Runners, one for each family of experiments; `bin/train.py` is the general one."""
