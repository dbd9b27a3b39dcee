# SPDX-License-Identifier: Apache-2.0
"""What all test folders share."""

from hypothesis import settings

# A busy machine may be slow at any moment; that is no finding. What is one can be replayed from the printed blob.
settings.register_profile("tandem", deadline=None, print_blob=True)
settings.load_profile("tandem")
