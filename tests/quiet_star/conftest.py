"""One thread for the tests of this folder."""

from ..single_thread import one_thread as one_thread
