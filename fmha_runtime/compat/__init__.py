# SPDX-License-Identifier: Apache-2.0
"""Look-alikes of other libraries' functions. Importing one does nothing to the process, ``install()`` does: call it."""
