"""The built-in model and its text: what `losa demo` runs on, with nothing downloaded."""
