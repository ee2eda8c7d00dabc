r"""What counts as the answer of a text: wordings of one right answer, and wordings that must not be taken for it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_lambdapo.rewards import AccuracyReward, RewardInputs


@pytest.fixture(scope="module")
def reward() -> Iterator[AccuracyReward]:
    judge = AccuracyReward(deadline=60.0)
    yield judge
    judge.close()


def judged(reward: AccuracyReward, gold: str, texts: list[str]) -> dict[str, float | None]:
    count = len(texts)
    verdicts = reward(
        RewardInputs(["?"] * count, texts, [gold] * count, [None] * count, [1] * count, [False] * count, [{}] * count)
    )
    return dict(zip(texts, verdicts, strict=True))


#: kind, gold answer, texts that give it, texts that do not
WORDINGS = [
    (
        "displayed maths", "73",
        ["The answer is\n\\[ 73 \\]", "The answer is:\n\n$$73$$\n", "**Answer:**\n\n\\[\nx = 73\n\\]",
         "The answer is\n\\[\n68 + 5 = 73.\n\\]\nWe are done.", "The answer is \\[73\\] as 68+5 = 73 and 2 is prime.",
         "The answer is\n\\begin{equation}\n73\n\\end{equation}", "The final answer is\n$$\n\\text{73}\n$$",
         "The answer is\n\\[\n\\begin{aligned}\nx &= 68 + 5 \\\\\n&= 73\n\\end{aligned}\n\\]",
         "The answer is $\n73\n$"],
        ["The answer is\n\\[\n75\n\\]\nnot 73", "The answer is\n\\[ 730 \\]", "The answer is\n\\[ -73 \\]",
         "The answer is\n\\[ \\frac{1}{73} \\]", "The answer is\n$$\n73x\n$$", "The answer is\n\\[ 73, 75 \\]",
         "The answer is\n\\begin{align*}\n73 + 2 &= 75\n\\end{align*}"],
    ),
    (
        "fences, lists and tags", "73",
        ["The answer is:\n```text\n73\n```", "The answer is:\n```\n73```", "The answer is `73`.",
         "The answer is:\n* 73",
         "The answer is:\n1. 73", "The answer is:\n\n  - 73", "The answer is:\n> 73", "The answer is:\n### 73",
         "The answer is <strong>73</strong>.", "The answer is <em>73</em>", "The answer is<br>73",
         'Answer: <span style="color:red">73</span>', "<p>The answer is <b>73</b>.</p>", "The answer is:\n\u2022 73",
         "The answer is:\n\n1. 68 and 5 are given.\n2. We add them: 68 + 5 = 73."],
        ["The answer is\n-73", "The answer is:\n- 75\n\nnot 73", "The answer is\n```\n75\n```\n73 was wrong",
         "The answer is <b>75</b> (73 was a mistake)", "The answer is:\n- 73\n- 75", "The answer is:\n- 7\n- 3"],
    ),
    ("a minus sign is no mark of a list", "-73", ["The answer is\n-73", "The answer is:\n- -73", "Answer: -73"], []),
    ("the dot of a number is no mark of a list", "12", ["The answer is\n12. That's it.", "Answer:\n\n12."], []),
    ("a list of answers", "3, 8", ["The answers are:\n- 3\n- 8", "The answers are\n1. $3$\n2. $8$"], ["Answers:\n- 3"]),
    (
        "headings", "73",
        ["**Final Answer**\n\n73", "### Final Answer\n\n**73**", "#### Answer\n73", "#### Answer: 73",
         "## Answer:\n$73$"],
        ["### Final Answer\n75\n\n### Check\n2 + 73 = 75", "#### Answer\n75\n", "**Answer**\n\n73 or 75"],
    ),
    (
        "adverbs", "73",
        ["The answer is precisely 73.", "The answer is thus 73.", "Hence the answer is simply 73",
         "The answer is, therefore, 73.", "The answer is about 73", "The answer is equal to 73.",
         "The answer is found to be 73.", "The answer is indeed $73$.", "The answer is therefore:\n\n73",
         "So the answer is just 73 apples.", "The answer is clearly exactly 73.", "The answer is in fact 73.",
         "The answer must be 73.", "The answer should be 73", "The answer is the number 73.", "The answer is \u2248 73",
         "The answer in simplest form is 73.", "The answer is (in cm) 73.", "The answer is, of course, 73",
         "The answer is <<68+5=73>>73."],
        ["The answer is less than 73.", "The answer is at least 73", "The answer is more than 73.",
         "The answer is twice 73.", "The answer is between 73 and 75", "The answer is never 73.",
         "The answer is exactly 7.3", "The answer is half of 73", "The answer is under 73", "The answer is below 73.5"],
    ),
    (
        "words", "blue",
        ["The answer is therefore blue.", "The answer is clearly Blue", "The answer is thus \\text{blue}.",
         "The answer is blue, not red.", "The answer is: **blue**", "The answer is, of course, blue."],
        ["The answer is not blue", "The answer is light blue", "The answer is red, not blue", "The answer isn't blue",
         "The answer is blue or red"],
    ),
    ("words that deny something", "not possible", ["The answer is not possible."], ["The answer is possible."]),
    (
        "what is denied", "73",
        ["The answer is 73 rather than 75.", "The answer is 73 instead of 75", "The answer is 73 (not 75).",
         "The answer is 73; not 75.", "The answer is not 75, it is 73.", "The answer is not 75, but rather 73.",
         "The answer is not 75. It is 73.", "The answer isn't 75 but 73", "It is 73, not 75.", "We get 73, not $75$.",
         "The answer is 73 and not 75.", "The answer is 73 \u2014 not 75", "So we get 73 instead of 75"],
        ["The answer isn't 73.", "The answer is not 73.", "The answer isn't 73 but 75", "It is 75, not 73.",
         "It is not 73.", "The answer cannot be 73.", "The answer is 75 rather than 73", "The answer isn't $73$.",
         "The answer is not 73, it is 75", "We get 75 instead of 73.", "It can't be 73", "It is not equal to 73."],
    ),
    (
        "explanations", "73",
        ["The answer is 73 because 68 + 5 = 73 > 72.", "The answer is 73, as 68+5=73.", "The answer is 73 (68 and 5).",
         "The answer is 73, so we are done with part 2.", "The answer is 73 - since 68 + 5 = 73",
         "The answer is 73, it is 5 more than 68.", "The answer is $73$ as $68 + 5 = 73$.", "The answer is 73 = 68 + 5",
         "The answer is x = 68 + 5 = 73", "The answer is 73, 75 is too large", "The answer is 73 (cm).",
         "Final Answer: The largest $n$ is 73.", "Answer: She has 73 apples", "Answer: the total cost is $73."],
        ["The answer is 75 (since 73 + 2 = 75)", "The answer is 75 because 73 is odd", "The answer is 73 + 2 = 75",
         "The answer is 75, as 73 + 2 = 75", "The answer is 73 + 5", "The answer is 73 or 75"],
    ),
    (
        "phrases without a value", "73",
        ["The answer is easy to find: 68 + 5 = 73", "The answer is as follows. First 68, then 5 more. So 73.",
         "The answer is found by adding 68 and 5. That makes 73.", "The answer is obtained like this: $68 + 5 = 73$",
         "The answer is hard to find. But 12 + 61 = 73.", "\\boxed{73}. The answer is correct.",
         "#### 73\nThe answer is easy to check: 73 - 68 = 5", "The answer is 73. The answer is clear.",
         "Answer: Let's think step by step. 68 + 5 = 73.", "Answer: We need the total. It is 68 + 5 = 73.",
         "The answer is 5? No. The answer is computed as follows: 68 + 5 = 73.", "The answer is below:\n\n$x = 73$"],
        ["The answer is found by adding 73 and 5. That makes 78.", "The answer is easy: add 2 to 73 to get 75",
         "\\boxed{75}. The answer is correct, since 75 - 2 = 73"],
    ),
    (
        "maths at the end", "\\sqrt{7}",
        ["It is \\(\\sqrt 7\\).", "so\n\\[ c = \\sqrt{7} \\]", "we get $c = \\sqrt{7}$ cm", "It is \\sqrt{7}.",
         "giving $\\sqrt{7}$ as the length", "It is $\\sqrt{7}$ cm^2.", "$x - \\sqrt 7 = 0 \\implies x = \\sqrt 7$"],
        ["The side is $2\\sqrt{7}$.", "It is $-\\sqrt{7}$", "It is $7$.", "$\\sqrt{7}$ of them, so 5 apples"],
    ),
    (
        "inequalities at the end", "x \\ge 4",
        ["Hence \\(x \\ge 4\\)", "Thus\n\\[ x \\geq 4. \\]", "So we need $$x\\ge 4$$", "The solution is $4 \\le x$.",
         "So $x \\in [4,\\infty)$."],
        ["Hence \\(x > 4\\)", "Thus\n\\[ x \\leq 4. \\]", "So we need $$y\\ge 4$$", "The solution is $x = 4$",
         "It is 4."],
    ),
    (
        "a number in maths is no answer of its own", "7",
        ["so $x = 7$.", "It is $7$.", "\\(3 + 4 = 7\\)"],
        ["The side has length $\\sqrt{7}$.", "The point is $(2,7)$.", "It is $x^7$.", "It is $\\frac{1}{7}$",
         "so $x \\ge 7$.", "which is $5 \\le x \\le 7$.", "It is \\sqrt{7}.", "it is $3+7$", "it is $2^{7}$",
         "the vector $\\begin{pmatrix}2\\\\7\\end{pmatrix}$", "Solutions: $x=5$ or $x=7$", "the line $y = 2x + 7$",
         "$\\log_2 7$", "the point $P_7$"],
    ),
    (
        "units after maths", "6\\pi",
        ["The area is $6\\pi$.", "The area is $6\\pi$ square units.", "so the area is \\(6\\pi \\text{ cm}^2\\)",
         "The area is $6\\pi$ $\\text{cm}^2$.", "The area is $6\\pi$ cm^2.", "\\[ A = \\pi r^2 = 6\\pi. \\]"],
        ["The area is $6\\pi^2$.", "The area is $\\pi$.", "The area is $6$."],
    ),
    (
        "numbers, money and maths", "12",
        ["There are 12 apples, where $n$ is the count.", "There are $12$ of them.", "She pays $5 and $7, so $12.",
         "It costs $5 for one and $12 for two", "The area is 12 $\\text{cm}^2$.", "The area is 12 cm$^2$.",
         "Let $n$ be 12.", "We pay 12\\$", "from $x=5$ we get 12 apples", "5$ and 7$ make 12$",
         "It is $3 \\cdot 4 = 12$.", "\\(x = 3 \\cdot 4 = 12\\)", "$x - 3 = 9 \\implies x = 12$"],
        ["The points are $A_{12}$.", "$12x$", "$x=12$ and $y=5$", "if $n \\ne 12$", "the interval $(5,12)$"],
    ),
    ("percent after maths", "0.28", ["It lost $28$ %.", "so $28\\%$ in total", "It is $28$ percent"], ["It is $28$."]),
    (
        "rounded after exact", "1.41",
        ["It is $\\sqrt{2} \\approx 1.41$.",
         "The answer is $\\sqrt2 \\approx 1.41$"], ["It is $\\sqrt2 \\approx 1.42$"],
    ),
    ("exact before rounded", "\\sqrt{2}", ["It is $\\sqrt{2} \\approx 1.41$."], ["It is $1.41 \\approx \\sqrt{2}$."]),
    (
        "several named values", "k=12, m=5",
        ["so $k=12$ and $m=5$.", "Thus\n\\[ k = 12, \\quad m = 5 \\]", "\\boxed{k = 12}, \\boxed{m = 5}",
         "Thus\n\\begin{align*} k &= 12 \\\\ m &= 5 \\end{align*}", "so \\(k=12\\) and \\(m=5\\)",
         "so $k = \\boxed{12}$ and $m = \\boxed{5}$"],
        ["so $k=5$ and $m=12$.", "\\boxed{k=12} and \\boxed{m=6}", "\\boxed{k=12}", "\\boxed{k=5} and \\boxed{m=12}"],
    ),
    (
        "several boxes that are one answer", "\\{3,8\\}",
        ["\\boxed{3} or \\boxed{8}", "$x=\\boxed{3}$ or $x=\\boxed{8}$", "\\[\\boxed{8}, \\boxed{3}\\]",
         "\\boxed{3}\\text{ and }\\boxed{8}", "$\\boxed{3}$, $\\boxed{8}$",
         "\\boxed{3} \\quad \\text{and} \\quad \\boxed{8}",
         "The roots are $3$ and $8$.", "The roots are $x=3$ or $x=8$", "\\boxed 3 and \\boxed 8"],
        ["\\boxed{3}", "\\boxed{3} and \\boxed{9}", "\\boxed{3} then \\boxed{8}",
         "\\boxed{3}, \\boxed{8} and \\boxed{9}",
         "First \\boxed{3}. No, \\boxed{8}"],
    ),
    (
        "the last of several boxes", "3",
        ["\\boxed{8}? No: \\boxed{3}", "\\boxed{8} is wrong, so \\boxed{3}", "\\boxed{3}, that is \\boxed{3}",
         "\\boxed{3} and \\boxed{3}", "\\boxed{8}\n\nCorrection:\n\\boxed{3}", "\\boxed{8}\n\\boxed{3}"],
        ["\\boxed{3} or \\boxed{8}", "\\boxed{8} or \\boxed{3}", "\\boxed{3}? No: \\boxed{8}",
         "\\boxed{8}, \\boxed{3}"],
    ),
    (
        "two numbers are no long one", "32349",
        ["\\boxed{32,349}", "\\boxed{32{,}349}", "\\boxed{32,\\!349}"], ["\\boxed{32} and \\boxed{349}",
         "\\boxed{32, 349}"],
    ),
    (
        "thoughts", "42",
        ["<think>maybe \\boxed{41}</think> \\boxed{42}", "<think>41</think>42", "maybe 41</think>The answer is 42.",
         "<think>\\boxed{41}</think>so $x=42$", "\\boxed{42}<think>or 43?"],
        ["<think>so \\boxed{42}, or", "<think>The answer is 42", "<think>\n#### 42", "<think><answer>42</answer>",
         "<think>a</think><think>\\boxed{42}", "<thinking>\\boxed{42}", "<think>6 * 7 = 42",
         "<think>\\boxed{42}</think>\\boxed{43}", "<think>\\boxed{42}</think> 43",
         "<think>The answer is 42</think> I do not know"],
    ),
    (
        "letters", "D",
        ["Option D is correct.", "(D) is the correct answer.", "D is correct.", "So D is the right answer, not C",
         "The correct option is D.", "The best choice is (D).", "The answer is D, not C.", "It isn't C but D",
         "(C) is wrong, (D) is right", "Choice D must be correct", "The answer isn't C. It's D",
         "**Option D** is correct",
         "I choose D", "The answer is not A or B but D", "The answer is $D$", "The answer is:\n$$\nD\n$$",
         "The answer is\n```\nD\n```", "The answer is <b>D</b>", "so it is \\(\\text{D}\\).",
         "The answer is therefore D.",
         "The answer is\n- D", "The answer is exactly (D)", "Option C is incorrect. Option D is correct.",
         "<think>maybe (C)</think> D"],
        ["The answer is not D", "The answer isn't (D).", "It isn't D.", "It cannot be (D)", "It is not option D",
         "Either A or D", "A, B and D", "(A), (D)", "It could be (B), (C), or (D).", "Options A and D", "It's C, not D",
         "C rather than D", "The answer is (A) or (D)", "neither B nor D", "D is wrong", "Option D is incorrect.",
         "The answer is A, B, or D", "We can rule out (D)", "A and D are correct", "The answer is not D but C",
         "(A)/(D)", "\\boxed{A} or \\boxed{D}", "<think>maybe (D)", "<think>\\boxed{D}"],
    ),
    (
        "other phrases", "73",
        ["<strong>The answer is</strong> 73", "<b>The answer is 73</b>", "<answer><b>73</b></answer>", "#### <b>73</b>",
         "The answer turns out to be 73.", "The answer comes out to 73", "The answer we get is 73.",
         "The answer I get is $73$", "The answer is none other than 73.", "The answer is a total of 73.",
         "The answer is '73'.", 'The answer is "73".', "Answer: \u2192 73", "The answer is 73 as opposed to 75",
         "The answer is 73, definitely not 75", "The answer is 73 [since 68+5=73]",
         "The answer is 73 by adding 68 and 5.", "The answer is not 75 but maybe $x = 73$.",
         "The answer is 60 + 8 + 5 = 68 + 5 = 73", "The answer is 73 * 1 = 73 dollars", "The answer is\n1) 73",
         "The answer is not \\(75\\) but \\(73\\).", "the answer is neither 75 nor 74 but 73"],
        ["The answer is 73 to 75", "The answer is 73 out of 100", "The answer is 73 minus 5",
         "The answer is 73 times 2", "The answer is '75'.", "The answer is not \\(73\\) but \\(75\\).",
         "The answer is negative 73",
         "The answer is 73 or more", "The answer is up to 73", "The answer is no more than 73",
         "the answer is neither 73 nor 74"],
    ),
    ("named values in rows", "k=12, m=5",
        ["\\boxed{k=12}\n\\boxed{m=5}", "- \\boxed{k=12}\n- \\boxed{m=5}", "\\[\\boxed{k=12} \\\\ \\boxed{m=5}\\]"],
        ["\\boxed{k=12}\n\\boxed{k=5}", "\\boxed{k=12}\n\nNo.\n\n\\boxed{m=5}"]),
    ("expressions at the end", "x+y",
        ["so it is $x+y$.", "We get $x+y$. Done.", "it simplifies to \\(x+y\\), as wanted", "the answer is x+y",
         "the answer is maybe $x+y$."],
        ["so it is $x-y$.", "$x+y$ is too large. It is $x$.", "$x+y$ of 5"]),
    ("values that hold words or signs", "1, i, -1, -i", ["The answer is 1, i, -1, -i."], ["The answer is 1, i"]),
    ("points", "(2,3)", ["The answer is the point (2, 3)", "The answer is $(2,3)$ (in the first quadrant)"], []),
    ("mixed units", "1 hour 20 minutes", ["The answer is 1 hour 20 minutes."], ["The answer is 1 hour 30 minutes."]),
    ("options that are denied", "D",
        ["Option D: 73", "D would be correct", "(A) is not right, so it is (D)", "Option D seems right.",
         "(B) and (C) are wrong, so (D)"],
        ["(D) is wrong.", "(D) is not correct", "(D) isn't right", "D cannot be right. It is (C)",
         "(B) and (D) are wrong", "(D) is too large", "(D) does not work"]),
    (
        "titles that begin with ####", "73",
        ["The total is \\boxed{73}.\n\n#### Check\n68 + 5 = 73, and 73 - 5 = 68.", "#### Step 1: add\n68 + 5 = 73",
         "**Answer:** 73\n\n#### Explanation\nThere are 68, then 5.", "#### Solution\n68 and 5 make 73.",
         "#### 1. Both numbers\n68 + 5\n#### 2. The sum\nIt is 73.", "#### Result\n73", "#### 73\n\nQuestion: 2 + 2?"],
        ["#### Step 73: add\n70 + 5 = 75", "#### 73. The sum\nIt is 75.", "#### 75\n\n#### Check\n75 - 2 = 73"],
    ),
    (
        "signs of unmarked numbers", "-73",
        ["The profit is -$73.", "It is **-$73**.", "We get 20-93=-73", "so x = - 73", "The change is \u201373.",
         "y=\u201173", "It is \u221273", "at \uff0d73 degrees", "It is minus 73.", "The result: negative 73"],
        ["It is 80 minus 73.", "from 2 - 73", "10\u201373", "the range 5-73", "It is 73.", "a sub-73"],
    ),
    (
        "what belongs to an unmarked number", "73",
        ["in 2 days it is 73", "In week 2:73 pages", "It is 73 or 73.0", "72+1 = 73!", "It weighs 73 kg^2"],
        ["The ratio is 2:73.", "at 10:73", "The length is 2\u221a73", "it is 73\u03c0 cm", "it is ln(73)",
         "The point is (2, 73).", "the set {3, 73}", "the values are 72 and 73", "maybe 72 or 73", "so x > 73",
         "x \u2265 73",
         "the line y = 2x + 73", "it is 3 \u00d7 10^73", "it is 2^73"],
    ),
    ("ratios and pairs without a mark", "(2, 7)", ["The point is (2, 7).", "It is **(2, 7)**."], ["(7, 2) it is",
         "(2, 8)"]),
    ("grouped digits in brackets", "1234", ["There are (1,234) people"], ["It is (1,235).", "It is (1, 234)."]),
    ("times without a mark", "10:30", ["It arrives at 10:30.", "so at **10:30** then"], ["It arrives at 10:31",
         "It is 30."]),
    (
        "what is bold in the last sentence", "12",
        ["She has **12 eggs** left of 15.", "5 + 7 = 12\n\nSo he needs **12** for 3 days", "It is **12**."],
        ["He has **12**. Then he buys 3, so 15.", "**Step 12:** it is 13", "**12** and **13**", "**12 eggs:** 13"],
    ),
    (
        "claims of others, and hedges", "73",
        ["The wrong answer is 75. It is 73.", "Some might say the answer is 75, but we get 73.",
         "If the answer is 75, both are odd. They are not, so 73.", "I thought the answer is 75. It is 73.",
         "The answer is 75. No, it is 73.", "The answer is 75. Wait, no. It is 73.", "I think the answer is 73.",
         "The answer is 73 \u2014 68 and 5 more.", "The answer is 73 (68+5).", "The answer is 73, i.e. 68 + 5"],
        ["The student's answer is 73. The right one is 75.", "The incorrect answer is 73, and 75 is right.",
         "The answer is 73 (or 75).", "The answer is 73 \u2014 or 75", "The answer is 73 (possibly 75)",
         "The answer is 73, but it could also be 75.", "The answer is 73. No, it is 75."],
    ),
    ("answers that are sentences", "73",
        ["<answer>The final answer is 73.</answer>", "<answer>So the answer is 73 apples</answer>"],
        ["<answer>The answer is not 73.</answer>", "<answer>The answer is 75</answer>"]),
    ("texts without blanks", "12",
        ["\u6240\u4ee5\u4e00\u5171\u670912\u4e2a\u82f9\u679c\u3002", "\u7b54\u3048\u306f12\u3067\u3059",
         "\\boxed{\uff11\uff12}"],
        ["\u4e00\u517113\u4e2a", "\\boxed{\uff11\uff13}"]),
    (
        "several letters", "D",
        ["\\boxed{D}", "<answer>(D) 15</answer>", "The answer is (D), as (A) is small"],
        ["<answer>(D) (E)</answer>", "<answer>D E</answer>", "<answer>D\nE</answer>", "\\boxed{D; E}", "\\boxed{D + E}",
         "\\boxed{D (or E)}", "\\boxed{D, maybe E}", "The answer is (D) iron or (E) zinc.",
         "<answer>D. 15\nE. 16</answer>",
         "The answer is option D or option E.", "The answer is D as well as E.", "(A) (B) (C) (D)", "A\nB\nC\nD",
         "Either (C) iron or (D)", "(C) or possibly (D)", 'The answer is "D" or "E".', "\\boxed{D \\\\ E}"],
    ),
    (
        "statements about options", "D",
        ["\\boxed{D}\n\nOption A is correct. Option B is correct.", "<answer>D</answer> Here option B is true.",
         "The answer is D. While option B is appropriate at first, it is slow.",
         "(B) is the most accurate test, but slow. So (D).", "(A) is true. (B) is true. (C) is false. So (D).",
         "One would choose (B) if it were cold; it is warm, hence (D).",
         "Many students choose B. However, the answer is D.",
         "**Answer: D**\n- Option A is correct: 2 is even.\n- Option B is correct: 3 is odd.",
         "**D**\n\nThe first one (A) is smaller.", "(D), because (A) is smaller", "Option D is the most likely."],
        ["\\boxed{A}\n\nOption D is correct.", "(D) is true. (B) is true.", "Many choose D. The answer is B.",
         "D\n\nWait, B."],
    ),
    (
        "a bold number before another value", "18",
        ["Janet sells **9 eggs**, earning $18 a day.", "With **9** a week and 2 each, he runs 9 * 2 = 18 miles.",
         "**Case 2** gives x = 18.", "**Day 1** total: 18", "The **4 by 5** square has area 18",
         "| **Total (3 rows)** | 18 |",
         "**18 eggs** remain out of 24", "In **2020**, it was 18"],
        ["**Option 18** is cheaper at $25.", "She sold **18**, then 20."],
    ),
    (
        "the same in another form", "8",
        ["The answer is 8 hours (or 480 minutes).", "The answer is 8 (or 8.0).", "The answer is 16/2 (or 8).",
         "Answer: 8\n\nNo. of pears: 5.", "The answer is 8. No: this is no trick. I used 5.",
         "So 40% of 20, or 8 pears, are left.",
         "The answer is 8, but it could be written in words."],
        ["The answer is 8 (or 9).", "The answer is 8 (or 8.5).", "The answer is 9 (or 540 minutes)"],
    ),
    (
        "options whose text is letters, and other options in one mark", "D",
        ["<answer>(D) A and B</answer>", "\\boxed{D) A and C}", "The answer is (D) A and B only",
         "The answer is (D) both (A) and (B).",
         "<answer>D. 15\n\nA. too small\nB. too small</answer>", "The answer is (D) 15 and (A) is too large.",
         "If option A is correct, x = 1, a contradiction. So option D is correct.",
         "Option D is the best fit. (B) lacks evidence",
         "Option A is correct on mass. Therefore, option D is correct.", "You should choose D. (B) lacks evidence",
         "If option A is correct, x is 1. Option D is correct.",
         "The capacitor has area A.\n\nD", "The answer is D. A is also correct in some books."],
        ["<answer>(D) (A)</answer>", "The answer is D (or A).",
         "Option D is correct on mass. Therefore, option A is correct."],
    ),
    ("letters without blanks", "D", ["\u6545\u9009D\u3002", "\u7b54\u6848\u662fD"], ["\u7b54\u6848\u4e0d\u662fD"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("gold", "right", "wrong"), [case[1:] for case in WORDINGS], ids=[case[0] for case in WORDINGS]
)
def test_wordings(reward: AccuracyReward, gold: str, right: list[str], wrong: list[str]) -> None:
    assert judged(reward, gold, right) == dict.fromkeys(right, 1.0)
    assert judged(reward, gold, wrong) == dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"), [case[1:] for case in WORDINGS], ids=[case[0] for case in WORDINGS]
)
def test_votes_follow_the_same_rules(reward: AccuracyReward, gold: str, right: list[str], wrong: list[str]) -> None:
    if gold.isalnum():
        assert {text: reward.vote(text) for text in right} == dict.fromkeys(right, gold)
    assert gold not in {reward.vote(text) for text in wrong}


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("so $x \\ge 4$.", "x\\ge 4"), ("It is $\\sqrt{7}$.", "\\sqrt{7}"),
        ("The answer is\n\\[ \\frac{2}{4} \\]", "1/2"),
        ("The roots are \\boxed{3} and \\boxed{8}.", "3,8"), ("The answer isn't 5", None), ("<think>5", None),
        ("(A) or (D)", None), ("We choose C = 3, so it is 12.", "12"), ("Angle C is right, so it is 90", "90"),
        ("so C is right-angled and has 12 cm", "12"), ("option c is correct", "C"),
    ],
)  # fmt: skip
def test_votes_of_other_kinds(reward: AccuracyReward, text: str, vote: str | None) -> None:
    assert reward.vote(text) == vote


def test_trial_wordings_come_out_as_expected(reward: AccuracyReward, shared_trials: Path) -> None:
    lines = [json.loads(line) for line in (shared_trials / "wordings.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines
    found = [judged(reward, line["gold"], [line["completion"]])[line["completion"]] for line in lines]
    assert found == [line["expected"] for line in lines]
