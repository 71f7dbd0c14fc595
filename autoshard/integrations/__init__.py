"""What other frameworks' training loops need to drive a parallel module. Nothing here is imported by
``import autoshard``: each file needs the framework that it is named after."""
