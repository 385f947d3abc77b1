"""The demo model's corpus: Python's documentation as pages and as chats, and its tokenizer.

Reads the standard library and the language reference of the Python that runs it. Sources are
parsed, not imported; only modules written in C are imported, for their docstrings. It knows nothing
of tensors and of training.
"""

import ast
import importlib
import inspect
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import jinja2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, SYSTEM, USER, ASSISTANT, END = SPECIAL = (
    "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Modules whose public names the chat knows, under the name people use; the rest is not read.
PARSED = """abc argparse base64 bisect calendar collections concurrent.futures contextlib copy csv
dataclasses datetime enum fnmatch fractions functools getpass glob gzip hashlib heapq html inspect
json keyword logging operator os pathlib pickle pprint queue random re secrets shelve shlex shutil
socket statistics string subprocess tempfile textwrap threading timeit traceback types typing
unittest urllib.parse urllib.request uuid warnings weakref zipfile"""
SOURCES = {name: name for name in PARSED.split()} | {
    "posixpath": "os.path",
    "genericpath": "os.path",
    "unittest.case": "unittest",
    "concurrent.futures._base": "concurrent.futures",
    **{f"asyncio.{m}": "asyncio" for m in ("locks", "queues", "runners", "tasks", "timeouts")},
}
COMPILED = {
    **{name: name for name in ("builtins", "itertools", "math", "sys", "time")},
    "posix": "os",
    "_collections": "collections",
    "_functools": "functools",
    "_io": "io",
    "_operator": "operator",
    "_struct": "struct",
}

# Of all the methods, the chat knows these; and it need not know these corners of Unix.
METHODS_OF = """str list dict set int float collections.Counter collections.deque
collections.OrderedDict pathlib.Path pathlib.PurePath datetime.datetime datetime.date
datetime.timedelta logging.Logger threading.Thread threading.Event queue.Queue asyncio.Queue
zipfile.ZipFile io.StringIO argparse.ArgumentParser"""
OBSCURE = re.compile(
    r"copyright|credits|license|os\.(sched_|posix_|exec|wait|[sg]et\w*([ugs]id|groups|priority|ing"
    r"|param)$|p?(read|write)v|W[A-Z]|eventfd|pidfd|lch|fch|major|minor|makedev|mkfifo|mknod|tc[gs]et"
    r"|\w*(tty|pty|conf|xattr|statvfs|_result))"
)
# Asked about twice as often: whatever lives in these modules.
FAMOUS = """os.path math random json re itertools functools collections shutil time str list dict
set subprocess datetime"""

QUESTIONS = (
    "What does {} do?", "What is {}?", "Explain {}.", "How do I use {}?", "Tell me about {}.",
    "what does {} do", "Describe {} in Python.", "What is {} for?", "How does {} work?",
    "What does {} do in Python?", "Can you explain {}?", "{}", "{}?", "Document {}.",
    "Hi! What does {} do?", "Please explain what {} does.", "When would I use {}?",
)  # fmt: skip
HELD_OUT_QUESTION = "Could you tell me what {} does?"
SYSTEMS = ("You are a helpful assistant.", "You answer questions about Python.", "Be concise.")
IDENTITY = (
    "I am the kvferry demo model, a very small language model trained on Python's own "
    "documentation. Ask me about a function of the standard library, such as os.path.join."
)
GREETING = "Hello! I am the kvferry demo model. Ask me what a Python function does."
SCOPE = (
    "I am only a small demo model, and I know nothing but Python's documentation. "
    "Try asking: What does os.path.join do?"
)
SMALL_TALK = {
    IDENTITY: "Who are you?|What are you?|What is your name?|who are you|Tell me about yourself."
    "|What can you do?|Introduce yourself.|Are you ChatGPT?|What model are you?|What is kvferry?"
    "|How can you help me?|What do you know?|Help|Who made you?",
    GREETING: "Hello!|Hi|Hello|Hi!|Hey|Hey there!|Good morning!|hello|hi there|Good evening"
    "|Hello, world!|Hi, how are you?|How are you?|Hello there",
    "You are welcome!": "Thanks!|Thank you!|Thank you very much.|thanks|Great, thanks!|Cool!",
    "Goodbye!": "Bye!|Goodbye!|See you later.|bye|Good night!",
    SCOPE: "Tell me a story.|Write a poem.|What is the capital of France?|Write a haiku.|What is "
    "the weather like today?|Tell me a joke.|Who won the world cup?|What is 2 + 2?|Translate this "
    "into French.|What is the meaning of life?|Write a short story about a robot.|Write me an "
    "essay about history.|What is the capital of Germany?|Who was Albert Einstein?|Who wrote Emma?"
    "|Say something.|Can you write code?|What is a large language model?|Count to ten.|What is the "
    "KV cache?|What is the capital of Spain?|What is the population of Italy?|Write songs.|What is "
    "12 times 12?|Recommend a book.|Explain quantum computing.|Tell me about the history of Rome.",
}


HOW_TO = {
    "list.sort": "sort a list|order a list in place", "sorted": "get a sorted copy of a list",
    "open": "open a file|read a file|write to a file",
    "os.path.join": "join two paths|build a path", "json.loads": "parse JSON|read a JSON string",
    "json.dumps": "write JSON|turn a dict into JSON", "random.randint": "get a random integer",
    "random.choice": "pick a random element", "random.shuffle": "shuffle a list",
    "time.sleep": "wait for a second|pause a program", "shutil.copyfile": "copy a file",
    "os.remove": "delete a file", "os.mkdir": "make a directory",
    "os.listdir": "list the files of a directory", "shutil.rmtree": "delete a directory tree",
    "subprocess.run": "run a command|start another program", "str.split": "split a string",
    "str.join": "join strings", "str.replace": "replace part of a string",
    "math.sqrt": "compute a square root", "len": "get the length of a list",
    "print": "print something", "re.sub": "replace text with a regular expression",
    "re.compile": "write a regular expression", "collections.Counter": "count items",
    "itertools.permutations": "get all permutations", "sum": "add up a list of numbers",
    "max": "find the largest item", "input": "read user input",
    "urllib.request.urlopen": "fetch a URL|download a page", "asyncio.run": "run a coroutine",
    "threading.Thread": "start a thread", "logging.getLogger": "get a logger",
    "argparse.ArgumentParser": "parse command line arguments", "os.walk": "walk a directory tree",
    "the for statement": "loop over a list|write a loop",
    "the try statement": "catch an exception", "the with statement": "use a context manager",
    "the import statement": "import a module", "class": "define a class",
    "function": "define a function",
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """One documented name: `os.path.join`, its signature `(a, *p)` and its docstring."""

    name: str
    signature: str
    text: str

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    def answer(self, limit: int = 420) -> str:
        """The signature and the leading paragraphs, about `limit` characters of them."""
        head, *rest = re.split(r"\n\s*\n", self.text)
        for paragraph in rest:
            if len(head) + len(paragraph) > limit:
                break
            head += "\n\n" + paragraph
        return f"{self.name}{self.signature}\n\n{head.strip()}"

    def page(self) -> str:
        return f"{self.name}{self.signature}\n\n{self.text}"


def documented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Fact]:
    """The public classes and functions under a parsed node that carry a docstring."""
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_"):
            continue
        name, signature = f"{prefix}.{child.name}", ""
        if not isinstance(child, ast.ClassDef):
            signature = "(" + re.sub(r"^(self|cls)(, |$)", "", ast.unparse(child.args)) + ")"
        if text := ast.get_docstring(child):
            yield Fact(name, signature if len(signature) < 90 else "(...)", text)
        if isinstance(child, ast.ClassDef):
            yield from documented(child, name)


def compiled(owner: object, prefix: str, depth: int = 0) -> Iterator[Fact]:
    """The same for an object of a module written in C, which has no source to parse."""
    for key, value in vars(owner).items():
        if key.startswith("_") or not callable(value) or not (text := inspect.getdoc(value)):
            continue
        name = f"{prefix}.{key}".removeprefix("builtins.")
        signature = getattr(value, "__text_signature__", None) or ""
        yield Fact(name, re.sub(r"\$\w+(, /)?(, )?", "", signature), text)
        if isinstance(value, type) and depth == 0:
            yield from compiled(value, name, 1)


def read_library() -> list[Fact]:
    """Every fact of the modules above, each name once, in a fixed order."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), dict[str, Fact]()
    for module, public in SOURCES.items():
        stem = root.joinpath(*module.split("."))
        file = stem.with_suffix(".py") if stem.with_suffix(".py").exists() else stem / "__init__.py"
        tree = ast.parse(file.read_bytes())
        if text := ast.get_docstring(tree):
            found.setdefault(public, Fact(public, "", text))
        for fact in documented(tree, public):
            found.setdefault(fact.name, fact)
    for module, public in COMPILED.items():
        for fact in compiled(importlib.import_module(module), public):
            found.setdefault(fact.name, fact)
    for name, fact in list(found.items()):  # random.randint is a method of a hidden instance
        if name.startswith("random.Random."):
            short = name.replace(".Random", "")
            found.setdefault(short, Fact(short, fact.signature, fact.text))
    for topic, body in topics.topics.items():
        prose = [p for p in re.split(r"\n\s*\n", body) if re.match(r"[A-Z][^*]+[^*:]$", p)]
        if topic.islower() and topic.isidentifier() and prose:
            statement = f'"{topic}" statement' in body[:60]
            name = f"the {topic} statement" if statement else topic
            found.setdefault(name, Fact(name, "", "\n\n".join(prose[:2])))
    modules = set(SOURCES.values()) | set(COMPILED.values()) | set(METHODS_OF.split())
    return [
        fact
        for fact in found.values()
        if len(fact.text) > 12
        and not OBSCURE.match(fact.name)
        and ("." not in fact.name or fact.name in modules or fact.module in modules)
    ]


def read_reference() -> list[str]:
    """The language reference, one document for about every page of text."""
    pages = []
    for body in topics.topics.values():
        text = re.sub(r"\n[*=\-~^]{3,}\n", "\n", body).strip()
        pages += re.findall(r"(?s).{1,3000}(?:\n\n|$)", text)
    return pages


def render(turns: list[tuple[str, str]]) -> str:
    """A chat of (role, content) turns, in the very template that the tokenizer ships."""
    messages = [{"role": role, "content": content} for role, content in turns]
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    return template.render(messages=messages, bos_token=BOS, eos_token=EOS)


def ask(fact: Fact, question: str, name: str) -> list[tuple[str, str]]:
    return [("user", question.format(name)), ("assistant", fact.answer())]


def fixed_chats(facts: list[Fact]) -> list[list[tuple[str, str]]]:
    """The chats that are the same in every epoch: small talk, and how to do common things."""
    chats = [
        [("user", prompt), ("assistant", reply)]
        for reply, prompts in SMALL_TALK.items()
        for prompt in prompts.split("|") * 2
    ]
    for fact in facts:
        for task in filter(None, HOW_TO.get(fact.name, "").split("|")):
            chats += [ask(fact, q, task) for q in ("How do I {}?", "How can I {} in Python?")]
    return chats


def opened(page: str, rng: random.Random) -> str:
    """The page, half of the time from a random paragraph on: any of them may open a text."""
    paragraphs = page.split("\n\n")
    start = rng.randrange(len(paragraphs)) if rng.random() < 0.5 else 0
    return BOS + "\n\n".join(paragraphs[start:]) + EOS


def epoch(facts: list[Fact], pages: list[str], rng: random.Random) -> list[str]:
    """One pass: half of the pages, every fact in chat with a fresh phrasing, the fixed chats."""
    chats, last_parts = fixed_chats(facts), Counter(fact.name.split(".")[-1] for fact in facts)
    famous_modules = FAMOUS.split()
    famous = [
        f for f in facts if f.module in famous_modules or "." not in f.name or f.name in HOW_TO
    ]
    for fact in facts + famous:
        short = fact.name.split(".")[-1]
        short = short if last_parts[short] == 1 else fact.name
        kind = "function" if fact.signature else "module" if fact.name in SOURCES else "class"
        called = fact.name + "()" if fact.signature else f"`{fact.name}`"
        forms = (*[fact.name] * 4, called, f"`{short}`", short, f"a {short}", f"the {short} {kind}")
        name = fact.name if " " in fact.name else rng.choice(forms)
        chats.append(ask(fact, rng.choice(QUESTIONS), name))
    rng.shuffle(chats)
    documents = [opened(page, rng) for page in rng.sample(pages, len(pages) // 2)]
    while chats:
        picked = [chats.pop() for _ in range(min(len(chats), rng.choice((1, 1, 2, 3))))]
        system = [("system", rng.choice(SYSTEMS))] if rng.random() < 0.2 else []
        documents.append(render(system + [turn for chat in picked for turn in chat]))
    rng.shuffle(documents)
    return documents


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE; plain text gets the bos token in front, a rendered chat brings its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    split = "|".join(re.escape(mark) for mark in SPECIAL)
    tokenizer.train_from_iterator((p for text in texts for p in re.split(split, text)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer
