import pytest

# Failed assertions of the helpers show their values, as those of tests do.
pytest.register_assert_rewrite("tests.helpers")
