"""Small programming problems with programs that are right, programs that are wrong, and input generators."""

NUMBERS = """
def make_input(kind, rng):
    if kind == "single":
        values = [rng.randint(-9, 9)]
    elif kind == "random":
        values = [rng.randint(-50, 50) for _ in range(rng.randint(2, 12))]
    elif kind == "large":
        values = [rng.randint(-10**6, 10**6) for _ in range(300)]
    elif kind == "adversarial":
        values = [-rng.randint(1, 9) for _ in range(5)]
    elif kind == "repeated":
        values = [rng.randint(-9, 9)] * 6
    elif kind == "alternating":
        values = [7, -3] * 4
    else:
        values = list(range(-4, 5))
    return f"{len(values)}\\n{' '.join(map(str, values))}\\n"
"""

MAXIMUM_SUM = {
    "id": "maximum-sum",
    "prompt": "Read n (1 to 1000), then n whole numbers. Print the largest sum of a run of one or more neighbours.",
    "accepted": [
        "input()\nbest = now = None\nfor x in map(int, input().split()):\n    now = x if now is None else max(x, now + x)\n    best = now if best is None else max(best, now)\nprint(best)\n",
        "n = int(input())\np = [0]\nfor x in map(int, input().split()):\n    p.append(p[-1] + x)\nprint(max(p[j] - p[i] for i in range(n) for j in range(i + 1, n + 1)))\n",
    ],
    "wrong": [
        # an empty run counts
        "input()\nbest = now = 0\nfor x in map(int, input().split()):\n    now = max(0, now + x)\n    best = max(best, now)\nprint(best)\n",
        "input()\nprint(sum(x for x in map(int, input().split()) if x > 0))\n",
        "input()\nprint(max(map(int, input().split())))\n",
        "input()\nprint(sum(map(int, input().split())))\n",
    ],
    "generators": [NUMBERS],
}

WORDS = """
def make_input(kind, rng):
    letters = {"random": "abcxyz", "large": "ab", "adversarial": "aA"}
    if kind in letters:
        return "".join(rng.choice(letters[kind]) for _ in range(200 if kind == "large" else 9)) + "\\n"
    if kind == "single":
        return rng.choice("abc") + "\\n"
    if kind == "repeated":
        return "q" * rng.randint(2, 30) + "\\n"
    if kind == "alternating":
        return "ab" * rng.randint(2, 9) + rng.choice(["", "a"]) + "\\n"
    return "abcdefgh"[: rng.randint(2, 8)] + "\\n"
"""

LONGEST_RUN = {
    "id": "longest-run",
    "prompt": "Read a word of 1 to 1000 letters. Print the length of the longest run of one letter. Case matters.",
    "accepted": [
        "import itertools\nprint(max(len(list(g)) for _, g in itertools.groupby(input())))\n",
        "s = input()\nbest = now = 1\nfor a, b in zip(s, s[1:]):\n    now = now + 1 if a == b else 1\n    best = max(best, now)\nprint(best)\n",
        {
            "language": "cpp",
            "text": "#include <bits/stdc++.h>\nusing namespace std;\nint main() { string s; cin >> s; int b = 0, n = 0; for (size_t i = 0; i < s.size(); i++) { n = i && s[i] == s[i-1] ? n + 1 : 1; b = max(b, n); } cout << b << endl; }\n",
        },
    ],
    "wrong": [
        "s = input().lower()\nbest = now = 1\nfor a, b in zip(s, s[1:]):\n    now = now + 1 if a == b else 1\n    best = max(best, now)\nprint(best)\n",
        "s = input()\nprint(max(map(s.count, s)))\n",
        # forgets the run at the end
        "s = input()\nbest = now = 1\nfor a, b in zip(s, s[1:]):\n    if a == b:\n        now += 1\n    else:\n        best = max(best, now)\n        now = 1\nprint(best)\n",
        "print(len(input()))\n",
    ],
    "generators": [WORDS],
}

PALINDROME = {
    "id": "palindrome",
    "prompt": "Read a word of 1 to 1000 letters. Print yes if it reads the same backwards, else no. Case matters.",
    "accepted": [
        "s = input()\nprint('yes' if s == s[::-1] else 'no')\n",
        "s = input()\nprint('yes' if all(s[i] == s[-1 - i] for i in range(len(s) // 2)) else 'no')\n",
    ],
    "wrong": [
        "print('yes')\n",
        "print('no')\n",
        "s = input()\nprint('yes' if s[0] == s[-1] else 'no')\n",
        "s = input()\nwhile True: pass\n",
    ],
    "generators": [
        WORDS,
        "def make_input(kind, rng):\n    half = ''.join(rng.choice('ab') for _ in range(6))\n    if kind == 'adversarial':\n        return 'a' + half + 'a'\n    return half + half[::-1]\n",
    ],
}

# Any of several answers is right where the maximum is not unique: accepted programs disagree there.
PLACE_OF_MAXIMUM = {
    "id": "place-of-maximum",
    "prompt": "Read n (1 to 1000), then n whole numbers. Print the place, from 0, of a largest one.",
    "accepted": [
        "input()\na = list(map(int, input().split()))\nprint(a.index(max(a)))\n",
        "input()\na = list(map(int, input().split()))\nprint(max(range(len(a)), key=lambda i: (a[i], i)))\n",
    ],
    "wrong": [
        "input()\na = list(map(int, input().split()))\nprint(a.index(min(a)))\n",
        "print(0)\n",
        "input()\na = list(map(int, input().split()))\nprint(a.index(max(a)) + 1)\n",
    ],
    "generators": [NUMBERS],
}

PROBLEMS = [MAXIMUM_SUM, LONGEST_RUN, PALINDROME, PLACE_OF_MAXIMUM]
