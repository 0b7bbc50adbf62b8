"""The Hugging Face Hub: models come from it and go to it.

Imports nothing of the package but `checkpoint`, `plain_yaml`, `secrets` and `errors`; whatever
talks to the Hub about models goes through `client`.
"""
