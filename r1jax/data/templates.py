"""How a question becomes the text a model sees."""

# Says what the paper's Table 1 asks of a base model, in our words; nothing about how to reason.
R1_ZERO = (
    "Below, a User talks with an Assistant. The User puts a question and the Assistant solves it: it first works out the "
    "reasoning in its mind and only then gives the User the answer. The reasoning stands between <think> and </think>, the "
    "answer between <answer> and </answer>, like this: <think> reasoning </think> <answer> answer </answer>.\n"
    "User: {question}\nAssistant:"
)


def render(question: str, template: str, instruction: str = "", chat=None) -> str:
    """Returns the prompt text of a question under a template: tiny, plain, r1_zero or chat.

    `chat` renders a list of messages with the tokenizer's own template. Raises ValueError for an unknown template.
    """
    if instruction:
        question = f"{instruction}\n{question}"
    if template in ("tiny", "plain"):
        return question
    if template == "r1_zero":
        return R1_ZERO.format(question=question)
    if template == "chat":
        return chat([{"role": "user", "content": question}])
    raise ValueError(f"no template named {template!r}; known: tiny, plain, r1_zero, chat")
