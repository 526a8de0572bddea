"""Captions as tokens, as the COCO scores see them: Stanford's PTBTokenizer without Java.

The official scorer (coco-caption, pycocoevalcap) sends its captions through CoreNLP 3.4.1 with -preserveLines -lowerCase
and then drops a list of marks. Here are the same tokens. Shapes: a caption -> its tokens.

What surprises, and is kept because scores depend on it:
- Brackets stay, as -lrb- and -rrb- (the official list has them in capitals, after everything became lower case). Runs such
  as "!!" or "?!" stay; single marks, dashes, quotes and ellipses go.
- can't is "ca n't", gonna "gon na", the dog's "dog 's"; hyphens and slashes within words hold them together.
- "end.Start" is one token, and so is "5 1/2" or "555 1234", with a no-break space inside: where the official code splits
  at any space (BLEU, CIDEr) that is two words, where it splits at " " (ROUGE-L) one.
- Pounds become #, euros $, cents "cents", a half 1/2. Signs that the lexer does not know, emoji among them, vanish.
- A full stop stays with an abbreviation (mr., etc., u.s.) and a single letter ("plan b. is"), but not where a sentence
  begins after the letter. At the end of a caption that officially depends on the next caption in the file; here the next
  one begins with "A", as most do.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache

REMOVED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""The official list; its brackets in capitals match nothing."""

# Python's \w holds numerals such as superscripts that are no letters, and lacks combining marks; the lexer reads no character
# beyond U+FFFF. Marks and numerals above U+3400 do not occur in captions.
_MARKS, _NUMERALS = (
    "".join(chr(code) for code in range(0x80, 0x3400) if unicodedata.category(chr(code)) in kinds)
    for kinds in (("Mn", "Mc"), ("Nl", "No"))
)
_BEYOND = "\U00010000-\U0010ffff"
DIGIT = rf"[^\D{_BEYOND}]"
ALPHA = rf"[^\W\d_{_NUMERALS}{_BEYOND}]"
ALNUM = rf"[^\W_{_NUMERALS}{_BEYOND}]"
LETTER = rf"(?:{ALPHA}|[\xad{_MARKS}])"
LETTER_OR_DIGIT = rf"(?:{ALNUM}|[\xad{_MARKS}])"
BLANK = "[ \t\xa0\u2000-\u200a\u3000]"
SPACE = "[ \t\n\xa0\u2000-\u200a\u3000]"
INNER_MARK = "[,;:\u3001]"

WORD = rf"{LETTER}{LETTER_OR_DIGIT}*(?:[.!?]{LETTER}{LETTER_OR_DIGIT}*)*"
APOSTROPHE = "(?:['\x92’]|(?i:&apos;))"
ANY_APOSTROPHE = "(?:['\x92’`\x91‘‛]|(?i:&apos;))"
# The tails of he's, I'm, you're, and of don't, whose head must not end in n: "ca n't", never "can 't".
SHORT_VERB = rf"{APOSTROPHE}(?i:[msd]|re|ve|ll)"
NOT = rf"(?i:n){ANY_APOSTROPHE}(?i:t)"
BEFORE_NOT = r"[A-Za-z\xad]*[A-MO-Za-mo-z]\xad*"

NUMBER = (
    rf"(?:{DIGIT}*(?:[.:,\xad\u066b\u066c]{DIGIT}+)+|{DIGIT}+(?:[.:,\xad\u066b\u066c]{DIGIT}+)*)"
)
SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_ELISION = rf"(?:[dDoOlL]{ANY_APOSTROPHE}{ALNUM})?"
HYPHENATED = rf"{_ELISION}{ALNUM}+(?:[-_\u058a\u2010\u2011]{_ELISION}{ALNUM}+)*"
COUNTRIES = r"(?i:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-(?:u\.k|u\.s\.s\.r))"
INITIAL = r"[A-Za-z](?:\.[A-Za-z])"
HYPHENATED_NUMBERS = (
    rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:(?:{COUNTRIES}|{INITIAL}+)\.|[A-Za-z0-9\xad]+))+"
)
TAG_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
TAG_VALUE = rf"(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"|{TAG_NAME}))?"
TAG = rf"<(?:[!?][A-Za-z-][^>\n]*|{TAG_NAME}(?: +{TAG_NAME}{TAG_VALUE})* */?|/{TAG_NAME}) *>"
FILE_ENDING = "|".join(
    "bat bmp class cgi cpp dll docx? exe gif gz html? jar java jpe?g mov mp3 pdf php pl png ppt ps py sql tar txt wav xml zip [chx]".split()
)

# Abbreviations that keep their full stop. A capital within (?-i:...) is asked for: "Wash." but "wash .".
PLACES = """ala|ariz|(?-i:A)z|(?-i:A)rk|calif|colo|conn|ct|dak|(?-i:D)el|fla|ga|(?-i:I)ll|ind|kans?|ky|(?-i:L)(?-i:a)|(?-i:M)ass|md
|mich|minn|(?-i:M)iss|mo|mont|neb|nev|okla|(?-i:O)re|(?-i:P)a|penn|tenn|(?-i:T)ex|va|vt|(?-i:W)ash|wisc?|wyo""".replace(
    "\n", ""
)
ENDING_ABBREVIATION = rf"""jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|{PLACES}
|inc|cos?|corp|pp?t(?-i:[ye])s?|ltd|plc|rt|bancorp|bhd|assn|univ|intl|sys|tel|est|ext|sq|jr|sr|bros|(?:ed|ph)\.d
|blvd|rd|esq|etc|al|seq|bldg""".replace("\n", "")
TITLE_ABBREVIATION = """mr|mrs|ms|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?|ave|pres
|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|mlle|mme|msgr|sfc|invt|elec|natl|m(?-i:[ft])g|dept|vs
|alex|wm|jos|cie|cf|treas|ph""".replace("\n", "")
# Before a digit only.
NUMBER_ABBREVIATION = "ca|figs?|prop|nos?|art|bldg|pp|op"
SENTENCE_START = rf"""(?:(?=[A-Z])(?i:a|about|according|additionally|after|an|as|at|but|earlier|he|her|here|however|if|in|it|last|many
|more|mr\.|ms\.|now|once|one|other|our|she|since|so|some|such|that|the|their|then|there|these|they|this|we|when|while|what|yet|you)
|{TAG})""".replace("\n", "")
# Words with an apostrophe of their own.
WITH_APOSTROPHE = "|".join(
    [
        rf"{APOSTROPHE}(?:(?i:n){APOSTROPHE}?|(?i:em|till?|cause)|[2-9]0[sS])",
        rf"(?:[lLdDjJ]|(?i:dunkin|somethin|ol)){APOSTROPHE}",
        rf"[A-HJ-XZn]{ANY_APOSTROPHE}{ALPHA}{{2}}{ALPHA}*",
        rf"{ALPHA}+[aeiouyAEIOUY]{ANY_APOSTROPHE}[aeiouA-Z]{ALPHA}*",
        rf"(?i:cont'd\.?|'twas|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)|[oO]{ANY_APOSTROPHE}[oO]",
    ]
)
URL = r'(?i:https?)://[^ \t\n"<>|(){}]+[^ \t\n"<>|.!?(){},-]'
# From , to _ are the capitals and digits too: the lexer forgot to escape a hyphen, and knows "a.com", not "1.com".
DOMAIN = (
    r"""(?:(?i:www)\.(?:[^ \t\n"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|(?:[^ \t\n"`'<>|.!?(){},-_$]+\.)+(?i:com|net|org|edu))"""
    r'(?:/[^ \t\n"<>|()]+[^ \t\n"<>|.!?(){},-])?'
)
EMAIL = r'(?:&lt;|<)?[a-zA-Z0-9][^ \t\n"<>|()\xa0{}]*@(?:[^ \t\n"<>|(){}.\xa0]+\.)*[^ \t\n"<>|(){}.\xa0]+(?:&gt;|>)?'
TELEPHONE = "|".join(
    [
        r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])[0-9]{3,4}[- \xa0]?[0-9]{3,5}",
        r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
    ]
)
FACES = r"[\^x=~<>]\.\[\^x=~<>]|[-\^x=~<>']_[-\^x=~<>']|\([-\^x=~<>'][_.]?[-\^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)"
SYMBOL = (
    r"[+%&~\^|\\\xa6\xa7\xa8\xa9\xac\xae\xaf\xb0-\xba\xd7\xf7\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2044"
    r"\u207a-\u207f\u208a-\u208e\u2100-\u214f\u2190-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)

_RENAMED = {
    **{
        "(": "-lrb-",
        ")": "-rrb-",
        "[": "-lsb-",
        "]": "-rsb-",
        "{": "-lcb-",
        "}": "-rcb-",
        '"': "''",
        "&quot;": "''",
    },
    **{
        "£": "#",
        "€": "$",
        "¤": "$",
        "\x80": "$",
        "₠": "$",
        "¢": "cents",
        "½": "1/2",
        "¼": "1/4",
        "¾": "3/4",
        "⅓": "1/3",
        "⅔": "2/3",
    },
    **{
        "&amp;": "&",
        "&lt;": "<",
        "&gt;": ">",
        "---": "--",
        "----": "--",
        "&md;": "--",
        "&mdash;": "--",
        "&ndash;": "--",
    },
    **dict.fromkeys("\x96\x97–—―", "--"),
}
_QUOTES = str.maketrans(
    {"‘": "`", "‛": "`", "‹": "`", "\x91": "`", "’": "'", "›": "'", "\x92": "'"}
    | {"“": "``", "«": "``", "\x93": "``", "”": "''", "»": "''", "\x94": "''"}
)
# Most of a caption needs no rule but these: a word of letters where no other rule can match more, and marks that are dropped.
_PLAIN = re.compile(
    r"(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna)\b)([A-Za-z]+)(?=[,;:!?]?[ \n])|(?: +|[,;:](?=[ \n])|\.(?=\n| [^.]))+"
)


def tokenize_caption(text: str) -> list[str]:
    """`text` as the official tokens, lower case, without the marks that the official list drops; [] for an empty caption.

    A token may hold a no-break space (see above), never a plain one. Line ends count as spaces.
    """
    caption = " ".join(text.splitlines())
    context = caption + "\nA\n"
    tokens, at = [], 0
    while at < len(caption):
        if plain := _PLAIN.match(context, at):
            tokens.append((plain.group(1) or "").lower())
            at = plain.end()
            continue
        found = [
            (match, rewrite)
            for pattern, rewrite in _rules()
            if (match := pattern.match(context, at))
        ]
        if not found:
            at += 1
            continue
        match, rewrite = max(found, key=lambda pair: pair[0].end())
        tokens.append(rewrite(match.group(1)).lower().replace(" ", "\xa0"))
        at = match.end(1)
    return [token for token in tokens if token and token not in REMOVED]


def _renamed(token: str) -> str:
    return _RENAMED.get(token.lower(), token.replace("\xad", ""))


def _quotes(token: str) -> str:
    return re.sub("(?i:&apos;)", "'", token).translate(_QUOTES)


def _brackets(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


def _dropped(token: str) -> str:
    return ""


@cache
def _rules() -> tuple[tuple[re.Pattern[str], Callable[[str], str]], ...]:
    """(pattern, how its token is written). The longest match wins, the earlier of equals. Group 1 is the token; what a
    pattern matches after it is context, which counts for the length."""
    rules: list[tuple[str, Callable[[str], str]]] = [
        (r"((?i:&nbsp;))", _dropped),
        (r"([cC]\+\+|[cCfF]\#)", _renamed),
        (
            "((?i:can(?=not)|gon(?=na)|got(?=ta)|lem(?=me)|gim(?=me)|wan(?=na)))(?i:not|na|ta|me)",
            _renamed,
        ),
        ("('(?i:t)(?=(?i:was|is)))(?i:was|is)", _renamed),
        (rf"({TAG})", str),
        ("((?i:&(?:md|mdash|ndash|amp);)|[\x96\x97–-―])", _renamed),
        ("((?i:&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);))", str),
        (rf"({WORD}){SHORT_VERB}", _renamed),
        (rf"({BEFORE_NOT}){NOT}", _renamed),
        (rf"({WORD})", _renamed),
        (rf"({WITH_APOSTROPHE})", str),
        (rf"([yY]{APOSTROPHE}){LETTER}", str),
        *((f"({address})", str) for address in (URL, DOMAIN, EMAIL)),
        (rf"(@[a-zA-Z_][a-zA-Z_0-9]*|\#{LETTER}+)", str),
        (rf"({SHORT_VERB}|{NOT})[^A-Za-z]", _quotes),
        (rf"([-+]?{NUMBER})", _renamed),
        (
            r"([\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+))",
            str,
        ),
        (rf"({DIGIT}{{1,2}}[-/]{DIGIT}{{1,2}}[-/]{DIGIT}{{2,4}})", str),
        (rf"((?:{DIGIT}{{1,4}}[- \xa0])?{DIGIT}{{1,4}}(?:\\?/|\u2044){DIGIT}{{1,4}})", str),
        (r"([\xbc-\xbe\u2153-\u215e])", _renamed),
        (
            rf"((?i:-[lr][rcs]b-|c\.d\.s|pro-|anti-|s(?:&|&amp;)(?:p-500|ls)|cap{APOSTROPHE}n|c{APOSTROPHE}est))",
            str,
        ),
        (rf"({SLASHED}(?:\\?/{SLASHED}){{1,2}})", str),
        (r"([A-Z]*\$|\#)", str),
        (r"([\xa2-\xa5\x80\u20a0\u20a4\u20ac\u060b\u0e3f\uffe0\uffe1\uffe5\uffe6])", _renamed),
        (rf"([A-Za-z])\.{SPACE}+{SENTENCE_START}{SPACE}", str),
        (rf"((?i:{NUMBER_ABBREVIATION})\.){SPACE}?[0-9]", str),
        (rf"((?i:pt[ey]|co)\.){BLANK}(?i:ltd|lim)", str),
        (rf"((?i:{ENDING_ABBREVIATION})\.)[\s\S]{{2}}", str),
        (rf"((?:{COUNTRIES}|{INITIAL}*|(?i:{TITLE_ABBREVIATION}))\.)", str),
        (rf"({APOSTROPHE}[0-9][0-9]){SPACE}", str),
        (
            rf"({LETTER_OR_DIGIT}+(?:\.{LETTER_OR_DIGIT}+)*\.(?i:{FILE_ENDING}))(?:{SPACE}|[.?!,])",
            str,
        ),
        (rf"({WORD}\.){INNER_MARK}", _renamed),
        (rf"({TELEPHONE})", _brackets),
        ('("|&quot;)', _renamed),
        (r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _brackets),
        (rf"({FACES})", _brackets),
        ("(<<|>>|&lt;|&gt;|[<>(){}[\\]]|-+)", _renamed),
        (r"(\.{3,5}|(?:\.[ \xa0]){2,4}\.|\u2026)", _dropped),
        (
            rf"(@+|\#+|_+|\*+|(?:\\\*){{1,3}}|[?!]+|{INNER_MARK}|[=/.\xa1\xbf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002])",
            str,
        ),
        (rf"({HYPHENATED_NUMBERS})", _renamed),
        (rf"({HYPHENATED_NUMBERS}\.){INNER_MARK}", _renamed),
        (rf"({HYPHENATED}\.){INNER_MARK}", str),
        (rf"({HYPHENATED})", str),
        (rf"([A-Z]+(?:(?:\+|&|&amp;)[A-Z]+)+\.){INNER_MARK}", str),
        (r"([A-Z]+(?:(?:\+|&|&amp;)[A-Z]+)+)", str),
        (r"(')[A-Za-z][^ \t\n\r\xa0]", str),
        ("([`‘-‟\x91-\x94‹›«»]{1,2}|''|['\x92]|(?i:&apos;))", _quotes),
        (rf"({SHORT_VERB}|{NOT})", _quotes),
        (rf"({SYMBOL})", str),
    ]
    return tuple((re.compile(pattern), rewrite) for pattern, rewrite in rules)
