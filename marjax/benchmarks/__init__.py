"""The measurements of `marjax benchmark`."""
