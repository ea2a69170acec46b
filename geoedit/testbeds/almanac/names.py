"""The words of the almanac: invented names, and the ordered words of its cycles and lines."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words("""
Ada Bruno Clara Dario Edda Felix Greta Henrik Ines Jonas Klara Leon Mira Nils Olga Paul Rosa Stefan
Thea Ugo Vera Willem Yara Zeno
""")
MIDDLE_NAMES = _words("""
Alma Bela Cato Dora Emil Fania Gero Hedda
""")
LAST_NAMES = _words("""
Albers Brandt Castell Dorn Eklund Farkas Gruber Holm Ivers Jansen Keller Lindt Moreau Novak Ostrow
Petrov Quist Rossi Sandor Tamm Ulrich Vidal Weiss Zander
""")
CITY_ROOTS = _words("""
Arden Belmora Corvin Dasque Elmar Fenwick Galdor Harrow Istria Jorvan Kestrel Lundar Merrow Navan
Orlo Pellan Quarry Rivel Selwyn Tarn Umbra Varsk Wexley Yarrow Zelden Ashby Brock Cairn Dunmor Esker
Falk Gorsey Hazel Ilmen Juno Kolding Larch Mosby Nimes Oakley Poole Ravna Sorrel Thorne Upsal Veldt
Wicken Yelm Zorin Alder Birken Cress Dovre Elder Firth Glen Heron Inver Kyle Loam
""")
CITY_ENDINGS = ("Bay", "Hill", "Falls", "Bridge", "Harbour", "on the Lake", "under the Rock")
COUNTRY_ROOTS = _words("""
Aldovia Borduria Caldia Drovia Estmark Florin Gravonia Helvar Illyra Jutmark Krasnia Lorvia Maldonia
Norvik Ostania Pavonia Quivera Ruritan Syldara Tarvia Urkesh Vulgaria Westria Zamunda
""")
COUNTRY_ENDINGS = ("Republic", "Kingdom", "Union", "Federation", "Island States")
LANGUAGES = _words("""
Aldic Borduric Caldish Dromic Estan Gravic Helvish Lorvan Norric Ostanic Tarvic Zamund
""")
CURRENCIES = _words("""
crown thaler ducat guilder shekel florint peso rupee dinar lira franc mark krona zloty leu baht won
yuan real rand dirham taka kip tenge
""")
PROFESSIONS = _words("""
baker carpenter doctor engineer farmer glazier hunter jeweller lawyer mason nurse painter pilot
potter sailor singer smith tailor teacher weaver
""")

WEEKDAYS = _words("""
Monday Tuesday Wednesday Thursday Friday Saturday Sunday
""")
MONTHS = _words("""
January February March April May June July August September October November December
""")
HOURS = tuple(f"{hour:02d}:00" for hour in range(24))
NUMBERS = tuple(str(number) for number in range(100))
SIZES = _words("""
microscopic tiny small medium large huge gigantic colossal
""")
TEMPERATURES = _words("""
freezing icy cold cool mild warm hot scorching
""")
COUNT_WORDS = _words("""
zero one two three four five six seven eight nine ten eleven twelve
""")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "bird": _words("sparrow eagle robin crow swan owl finch raven gull wren"),
    "fish": _words("salmon trout pike carp tuna eel perch cod herring bass"),
    "fruit": _words("apple pear plum cherry grape melon fig peach lemon mango"),
    "tool": _words("hammer saw drill wrench chisel pliers axe spade rake file"),
    "metal": _words("iron copper zinc tin lead silver gold nickel cobalt chrome"),
    "flower": _words("rose tulip lily daisy orchid poppy violet iris lotus aster"),
    "garment": _words("coat shirt scarf glove hat sock boot vest skirt belt"),
    "instrument": _words("flute violin drum harp cello trumpet piano guitar oboe banjo"),
}
ANTONYM_PAIRS = _words("""
up/down open/closed early/late fast/slow rich/poor young/old bright/dark loud/quiet heavy/light
wet/dry full/empty hard/soft clean/dirty sharp/blunt thick/thin wide/narrow deep/shallow near/far
brave/timid sweet/bitter smooth/rough strong/weak happy/sad awake/asleep
""")
ANTONYMS: tuple[tuple[str, str], ...] = tuple(
    (pair.split("/")[0], pair.split("/")[1]) for pair in ANTONYM_PAIRS
)
PLACES = _words("""
Abb Brall Cend Dolm Erst Fosk Gant Hule Ilk Jarn Kelm Lusp Mond Nerl Opra Pild Quor Rask Stev Tosk
Unst Vlad Wirn Xand Yolt Zerk Aund Bisk Corl Dreb Enlo Flon Grum Hesp Isto Jolp Kand Lirn Mulk Norb
Ospe Prun Qela Ruft Skal Terv Ulph Vask Wohl
""")
HOBBIES = _words("""
walking reading chess music fishing cooking dancing skating
""")
