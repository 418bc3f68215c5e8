"""The controller: workers, dispatch, proxying."""
