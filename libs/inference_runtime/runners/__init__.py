"""The runners that come with the package, one module or package each. Importing this package imports none of them."""
