"""Tokenizes captions as the official COCO scores do: Stanford's PTBTokenizer without Java.

The official scorer (coco-caption, pycocoevalcap) runs captions through CoreNLP 3.4.1 with
-preserveLines -lowerCase and then removes a list of punctuation tokens. The tokens here are the
same.

What is surprising, and kept because scores depend on it:

- Brackets stay, as -lrb- and -rrb- (the official list has them in capitals, but all tokens are
  lower case by then). Runs such as "!!" or "?!" stay; single punctuation marks, dashes, quotes and
  ellipses are removed.
- can't becomes "ca n't", gonna "gon na", the dog's "dog 's"; hyphens and slashes inside a word do
  not split it.
- "end.Start" is one token, and so is "5 1/2" or "555 1234", with a no-break space inside. Where the
  official code splits at any space (BLEU, CIDEr) that is two words, where it splits at " "
  (ROUGE-L) one.
- Pounds become #, euros $, cents "cents", a half 1/2. Characters that the lexer does not know are
  dropped, emoji among them.
- A period stays with an abbreviation (mr., etc., u.s.) and with a single letter ("plan b. is"), but
  not where a sentence begins after the letter. At the end of a caption the official result depends
  on the next caption in the file; here the next one begins with "A", as most do.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache

Rewrite = Callable[[str], str]

REMOVED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""The official list without its brackets in capitals, which match nothing."""

# Character classes


# Python's \w contains numerals such as superscripts, which are not letters, and lacks combining
# marks. The lexer reads no character beyond U+FFFF. Combining marks and numerals above U+3400 do
# not occur in captions.
def _list_characters(*categories: str) -> str:
    characters = map(chr, range(0x80, 0x3400))
    return "".join(c for c in characters if unicodedata.category(c) in categories)


_MARKS = _list_characters("Mn", "Mc")
_NUMERALS = _list_characters("Nl", "No")
_BEYOND_BMP = "\U00010000-\U0010ffff"
DIGIT = rf"[^\D{_BEYOND_BMP}]"
ALPHA = rf"[^\W\d_{_NUMERALS}{_BEYOND_BMP}]"
ALNUM = rf"[^\W_{_NUMERALS}{_BEYOND_BMP}]"
LETTER = rf"(?:{ALPHA}|[\xad{_MARKS}])"
LETTER_OR_DIGIT = rf"(?:{ALNUM}|[\xad{_MARKS}])"
BLANK = "[ \t\xa0\u2000-\u200a\u3000]"
SPACE = "[ \t\n\xa0\u2000-\u200a\u3000]"
INNER_PUNCTUATION = "[,;:\u3001]"

# Words, numbers, tags

WORD = rf"{LETTER}{LETTER_OR_DIGIT}*(?:[.!?]{LETTER}{LETTER_OR_DIGIT}*)*"
APOSTROPHE = "(?:['\x92’]|(?i:&apos;))"
ANY_APOSTROPHE = "(?:['\x92’`\x91‘‛]|(?i:&apos;))"
# Endings of he's, I'm, you're, and of don't. The part before n't must not end in n: can't is
# "ca n't", never "can 't".
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
    """
    bat bmp class cgi cpp dll docx? exe gif gz html? jar java jpe?g mov mp3 pdf php pl png ppt ps py
    sql tar txt wav xml zip [chx]
    """.split()
)

# Abbreviations that keep their period

# Letters within (?-i:...) must be capitals: "Wash." stays, but "wash." becomes "wash .".
PLACES = "|".join(
    """
    ala ariz (?-i:A)z (?-i:A)rk calif colo conn ct dak (?-i:D)el fla ga (?-i:I)ll ind kans? ky
    (?-i:L)(?-i:a) (?-i:M)ass md mich minn (?-i:M)iss mo mont neb nev okla (?-i:O)re (?-i:P)a penn
    tenn (?-i:T)ex va vt (?-i:W)ash wisc? wyo
    """.split()
)
ENDING_ABBREVIATION = "|".join(
    rf"""
    jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri {PLACES} inc cos? corp
    pp?t(?-i:[ye])s? ltd plc rt bancorp bhd assn univ intl sys tel est ext sq jr sr bros
    (?:ed|ph)\.d blvd rd esq etc al seq bldg
    """.split()
)
TITLE_ABBREVIATION = "|".join(
    """
    mr mrs ms drs? profs? sens? reps? attys? lt col gen messrs govs? adm rev maj sgt cpl pvt capt
    ste? ave pres lieut hon brig co?mdr pfc spc supts? det mt ft adj adv asst assoc ens insp mlle
    mme msgr sfc invt elec natl m(?-i:[ft])g dept vs alex wm jos cie cf treas ph
    """.split()
)
# These keep it only before a digit.
NUMBER_ABBREVIATION = "ca|figs?|prop|nos?|art|bldg|pp|op"
_SENTENCE_WORD = "|".join(
    r"""
    a about according additionally after an as at but earlier he her here however if in it last many
    more mr\. ms\. now once one other our she since so some such that the their then there these
    they this we when while what yet you
    """.split()
)
SENTENCE_START = rf"(?:(?=[A-Z])(?i:{_SENTENCE_WORD})|{TAG})"

# Words with an inner apostrophe, addresses, symbols

WITH_APOSTROPHE = "|".join(
    [
        rf"{APOSTROPHE}(?:(?i:n){APOSTROPHE}?|(?i:em|till?|cause)|[2-9]0[sS])",
        rf"(?:[lLdDjJ]|(?i:dunkin|somethin|ol)){APOSTROPHE}",
        rf"[A-HJ-XZn]{ANY_APOSTROPHE}{ALPHA}{{2}}{ALPHA}*",
        rf"{ALPHA}+[aeiouyAEIOUY]{ANY_APOSTROPHE}[aeiouA-Z]{ALPHA}*",
        r"(?i:cont'd\.?|'twas|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
        rf"[oO]{ANY_APOSTROPHE}[oO]",
    ]
)
URL = r'(?i:https?)://[^ \t\n"<>|(){}]+[^ \t\n"<>|.!?(){},-]'
# The class ",-_" excludes capitals and digits too, because the lexer does not escape its hyphen: it
# knows "a.com", not "1.com".
DOMAIN = (
    r"""(?:(?i:www)\.(?:[^ \t\n"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"""
    r"""|(?:[^ \t\n"`'<>|.!?(){},-_$]+\.)+(?i:com|net|org|edu))"""
    r'(?:/[^ \t\n"<>|()]+[^ \t\n"<>|.!?(){},-])?'
)
EMAIL = (
    r'(?:&lt;|<)?[a-zA-Z0-9][^ \t\n"<>|()\xa0{}]*@'
    r'(?:[^ \t\n"<>|(){}.\xa0]+\.)*[^ \t\n"<>|(){}.\xa0]+(?:&gt;|>)?'
)
TELEPHONE = "|".join(
    [
        r"(?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])"
        r"[0-9]{3,4}[- \xa0]?[0-9]{3,5}",
        r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
    ]
)
EMOTICON = "|".join(
    [
        r"[\^x=~<>]\.\[\^x=~<>]",
        r"[-\^x=~<>']_[-\^x=~<>']",
        r"\([-\^x=~<>'][_.]?[-\^x=~<>']\)",
        r"\([\^x=~<>']-[\^x=~<>'`]\)",
    ]
)
SYMBOL = (
    r"[+%&~\^|\\\xa6\xa7\xa8\xa9\xac\xae\xaf\xb0-\xba\xd7\xf7"
    r"\u2016\u2017\u2020-\u2023\u2030-\u2038\u203b\u203e-\u2044\u207a-\u207f\u208a-\u208e"
    r"\u2100-\u214f\u2190-\u2bff\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)

# How tokens are rewritten

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CURRENCIES = {"£": "#", "€": "$", "¤": "$", "\x80": "$", "₠": "$", "¢": "cents"}
_FRACTIONS = {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_ENTITIES = {"&quot;": "''", "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_DASHES = dict.fromkeys(
    ["---", "----", "&md;", "&mdash;", "&ndash;", "\x96", "\x97", "–", "—", "―"], "--"
)
_REPLACEMENTS = {'"': "''", **_BRACKETS, **_CURRENCIES, **_FRACTIONS, **_ENTITIES, **_DASHES}
_QUOTES = str.maketrans(
    {"‘": "`", "‛": "`", "‹": "`", "\x91": "`", "’": "'", "›": "'", "\x92": "'"}
    | {"“": "``", "«": "``", "\x93": "``", "”": "''", "»": "''", "\x94": "''"}
)


def _replace(token: str) -> str:
    return _REPLACEMENTS.get(token.lower(), token.replace("\xad", ""))


def _replace_quotes(token: str) -> str:
    return re.sub("(?i:&apos;)", "'", token).translate(_QUOTES)


def _replace_parentheses(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


def _drop(token: str) -> str:
    return ""


# Tokenizer

# Most of a caption needs none of the rules below: a word of letters where no other rule can match
# more, and spaces and punctuation that are removed anyway.
_PLAIN = re.compile(
    r"(?!(?i:cannot|gonna|gotta|lemme|gimme|wanna)\b)([A-Za-z]+)(?=[,;:!?]?[ \n])"
    r"|(?: +|[,;:](?=[ \n])|\.(?=\n| [^.]))+"
)


def tokenize_caption(text: str) -> list[str]:
    """Returns the official tokens of a caption, lower case and without those in `REMOVED`.

    An empty caption has no tokens. A token may contain a no-break space (see the top of this file)
    but never a plain one. Line ends count as spaces.
    """
    caption = " ".join(text.splitlines())
    context = caption + "\nA\n"
    tokens, position = [], 0
    while position < len(caption):
        plain = _PLAIN.match(context, position)
        if plain:
            tokens.append((plain.group(1) or "").lower())
            position = plain.end()
            continue
        match, rewrite = _match_longest(context, position)
        if match is None:
            position += 1
            continue
        tokens.append(rewrite(match.group(1)).lower().replace(" ", "\xa0"))
        position = match.end(1)
    return [token for token in tokens if token and token not in REMOVED]


def _match_longest(context: str, position: int) -> tuple[re.Match[str] | None, Rewrite]:
    """Returns the longest match of a rule at a position, of equal ones the first, or None."""
    longest: re.Match[str] | None = None
    longest_rewrite: Rewrite = str
    for pattern, rewrite in _compile_rules():
        match = pattern.match(context, position)
        if match and (longest is None or match.end() > longest.end()):
            longest, longest_rewrite = match, rewrite
    return longest, longest_rewrite


@cache
def _compile_rules() -> tuple[tuple[re.Pattern[str], Rewrite], ...]:
    """Returns the lexer's rules, each a pattern and a function that rewrites its token.

    The longest match wins, of equal ones the first. Group 1 is the token; what a pattern matches
    after it is context, which counts for the length.
    """
    rules: list[tuple[str, Rewrite]] = [
        (r"((?i:&nbsp;))", _drop),
        (r"([cC]\+\+|[cCfF]\#)", _replace),
        (
            "((?i:can(?=not)|gon(?=na)|got(?=ta)|lem(?=me)|gim(?=me)|wan(?=na)))(?i:not|na|ta|me)",
            _replace,
        ),
        ("('(?i:t)(?=(?i:was|is)))(?i:was|is)", _replace),
        (rf"({TAG})", str),
        ("((?i:&(?:md|mdash|ndash|amp);)|[\x96\x97–-―])", _replace),
        ("((?i:&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);))", str),
        (rf"({WORD}){SHORT_VERB}", _replace),
        (rf"({BEFORE_NOT}){NOT}", _replace),
        (rf"({WORD})", _replace),
        (rf"({WITH_APOSTROPHE})", str),
        (rf"([yY]{APOSTROPHE}){LETTER}", str),
        *((f"({address})", str) for address in (URL, DOMAIN, EMAIL)),
        (rf"(@[a-zA-Z_][a-zA-Z_0-9]*|\#{LETTER}+)", str),
        (rf"({SHORT_VERB}|{NOT})[^A-Za-z]", _replace_quotes),
        (rf"([-+]?{NUMBER})", _replace),
        (
            r"([\u207a\u207b\u208a\u208b]?(?:[\u2070\xb9\xb2\xb3\u2074-\u2079]+|[\u2080-\u2089]+))",
            str,
        ),
        (rf"({DIGIT}{{1,2}}[-/]{DIGIT}{{1,2}}[-/]{DIGIT}{{2,4}})", str),
        (rf"((?:{DIGIT}{{1,4}}[- \xa0])?{DIGIT}{{1,4}}(?:\\?/|\u2044){DIGIT}{{1,4}})", str),
        (r"([\xbc-\xbe\u2153-\u215e])", _replace),
        (
            r"((?i:-[lr][rcs]b-|c\.d\.s|pro-|anti-|s(?:&|&amp;)(?:p-500|ls)"
            rf"|cap{APOSTROPHE}n|c{APOSTROPHE}est))",
            str,
        ),
        (rf"({SLASHED}(?:\\?/{SLASHED}){{1,2}})", str),
        (r"([A-Z]*\$|\#)", str),
        (r"([\xa2-\xa5\x80\u20a0\u20a4\u20ac\u060b\u0e3f\uffe0\uffe1\uffe5\uffe6])", _replace),
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
        (rf"({WORD}\.){INNER_PUNCTUATION}", _replace),
        (rf"({TELEPHONE})", _replace_parentheses),
        ('("|&quot;)', _replace),
        (r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _replace_parentheses),
        (rf"({EMOTICON})", _replace_parentheses),
        ("(<<|>>|&lt;|&gt;|[<>(){}[\\]]|-+)", _replace),
        (r"(\.{3,5}|(?:\.[ \xa0]){2,4}\.|\u2026)", _drop),
        (
            rf"(@+|\#+|_+|\*+|(?:\\\*){{1,3}}|[?!]+|{INNER_PUNCTUATION}"
            r"|[=/.\xa1\xbf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002])",
            str,
        ),
        (rf"({HYPHENATED_NUMBERS})", _replace),
        (rf"({HYPHENATED_NUMBERS}\.){INNER_PUNCTUATION}", _replace),
        (rf"({HYPHENATED}\.){INNER_PUNCTUATION}", str),
        (rf"({HYPHENATED})", str),
        (rf"([A-Z]+(?:(?:\+|&|&amp;)[A-Z]+)+\.){INNER_PUNCTUATION}", str),
        (r"([A-Z]+(?:(?:\+|&|&amp;)[A-Z]+)+)", str),
        (r"(')[A-Za-z][^ \t\n\r\xa0]", str),
        ("([`‘-‟\x91-\x94‹›«»]{1,2}|''|['\x92]|(?i:&apos;))", _replace_quotes),
        (rf"({SHORT_VERB}|{NOT})", _replace_quotes),
        (rf"({SYMBOL})", str),
    ]
    return tuple((re.compile(pattern), rewrite) for pattern, rewrite in rules)
