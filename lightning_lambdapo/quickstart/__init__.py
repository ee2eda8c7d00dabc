"""The built-in tiny policy of the quickstart, and how it was made.

``policy/`` is a Llama of about 0.3 M parameters over single characters. It writes out three-term sums and gets about
four in ten right. It was made by ``python -m lightning_lambdapo.quickstart DIRECTORY``.
"""
