# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""`python -m diffvp.cli`."""

from . import main

if __name__ == "__main__":
    main()
