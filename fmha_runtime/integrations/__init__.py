# SPDX-License-Identifier: Apache-2.0
"""Adapters to other libraries. Importing one does nothing, ``register()`` does: call it."""
