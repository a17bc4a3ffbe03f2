"""Settings shared by the tests of all plugin packages."""

import os

# Lightning 2.6 uses functions that jsonargparse 4.49 deprecates; which warning comes first depends on the test order.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
