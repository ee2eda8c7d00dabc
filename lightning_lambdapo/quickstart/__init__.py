"""The built-in tiny policy of the quickstart, and how it was made.

``policy/`` holds a Llama of about 0.3 M parameters over single characters that writes out three-term sums and gets
about four in ten right. It was made by ``python -m lightning_lambdapo.quickstart DIRECTORY``.
"""
