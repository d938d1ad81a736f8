"""From a conversation to an answer: templates, thinking, pieces of text. Used by chat, eval and demo."""
