# ruff: noqa: E501, RUF001
"""Words of the recipes' made-up desks: what they sell and do, who asks, and how it is said in other languages."""

PEOPLE = (
    "Ada Lind",
    "Boris Kahn",
    "Chen Yu",
    "Dina Ortiz",
    "Emil Novak",
    "Fatou Sow",
    "Grace Hill",
    "Hugo Maas",
    "Ines Prado",
    "Jonas Weber",
    "Kofi Mensah",
    "Leila Amiri",
)
PLACES = ("Lisbon", "Oslo", "Quito", "Riga", "Turin", "Accra", "Leeds", "Ghent", "Porto", "Basel", "Cork", "Malmö")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FAULTS = ("came broken", "never arrived", "is the wrong colour", "makes a strange noise", "stopped working", "leaks")
MOODS = {
    "positive": (
        "worth every cent",
        "better than I hoped",
        "my whole family likes it",
        "works like a charm",
        "I would buy it again",
        "so easy to use",
        "the best one I have had",
        "arrived early and well packed",
    ),
    "negative": (
        "a waste of money",
        "fell apart after a week",
        "I sent it back",
        "worse than the old one",
        "not what the picture shows",
        "too loud to bear",
        "the support never answered",
        "I regret buying it",
    ),
}
# For every desk: its things, and what it calls the person, the thing, the place and the day that a text is about.
DESKS: dict[str, tuple[tuple[str, ...], tuple[str, str, str, str]]] = {
    "kitchen": (("kettle", "toaster", "blender", "frying pan", "coffee mill"), ("buyer", "item", "city", "day")),
    "travel": (("night train", "ferry", "bus pass", "rental car", "flight"), ("traveller", "trip", "stop", "date")),
    "clinic": (("blood test", "flu shot", "eye exam", "x-ray", "check-up"), ("patient", "service", "site", "visit")),
    "library": (("atlas", "cookbook", "novel", "song book", "dictionary"), ("reader", "title", "branch", "due")),
    "garden": (("rose bush", "lawn mower", "watering can", "apple tree", "hedge trimmer"), ("owner", "goods", "town", "slot")),
    "music": (("violin", "drum kit", "flute", "grand piano", "guitar"), ("player", "instrument", "hall", "session")),
    "bank": (("credit card", "savings account", "car loan", "mortgage", "debit card"), ("client", "product", "office", "term")),
    "school": (("maths class", "swimming course", "art lesson", "exam", "field trip"), ("pupil", "course", "campus", "weekday")),
    "repair": (("washing machine", "bike", "phone screen", "boiler", "laptop"), ("customer", "device", "area", "pickup")),
    "hotel": (("double room", "breakfast", "sea view suite", "parking space", "spa pass"), ("guest", "booking", "house", "night")),
    "sports": (("tennis racket", "kayak", "ski boots", "climbing rope", "football"), ("member", "gear", "club", "match")),
    "food": (("pizza", "noodle soup", "veggie burger", "fruit box", "sushi set"), ("eater", "dish", "district", "delivery")),
}  # fmt: skip
# 中文: things, people, places and days of desks that are written to in Chinese.
CHINESE: dict[str, tuple[tuple[str, ...], tuple[str, str, str, str]]] = {
    "快递": (("包裹", "信件", "行李箱", "花束"), ("收件人", "物品", "城市", "日期")),
    "餐厅": (("火锅", "烤鸭", "牛肉面", "点心"), ("客人", "菜品", "分店", "时间")),
    "医院": (("体检", "疫苗", "牙科检查", "拍片"), ("病人", "项目", "院区", "就诊日")),
    "书店": (("词典", "小说", "地图册", "童话书"), ("读者", "书名", "门店", "取书日")),
}
CHINESE_PEOPLE = ("李明", "王芳", "张伟", "刘洋", "陈静", "赵磊")
CHINESE_PLACES = ("北京", "上海", "广州", "成都", "西安", "杭州")
CHINESE_DAYS = ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六")
# English, and the same in the order of LANGUAGES.
LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch", "Chinese")
THINGS_IN = {
    "two tickets": ("deux billets", "dos entradas", "zwei Karten", "due biglietti", "dois bilhetes", "twee kaartjes", "两张票"),
    "a quiet room": ("une chambre calme", "una habitación tranquila", "ein ruhiges Zimmer", "una camera tranquilla", "um quarto calmo", "een rustige kamer", "一间安静的房间"),
    "the bill": ("l'addition", "la cuenta", "die Rechnung", "il conto", "a conta", "de rekening", "账单"),
    "a new key": ("une nouvelle clé", "una llave nueva", "einen neuen Schlüssel", "una chiave nuova", "uma chave nova", "een nieuwe sleutel", "一把新钥匙"),
    "some water": ("de l'eau", "un poco de agua", "etwas Wasser", "dell'acqua", "um pouco de água", "wat water", "一些水"),
    "a doctor": ("un médecin", "un médico", "einen Arzt", "un medico", "um médico", "een dokter", "一位医生"),
    "a larger table": ("une table plus grande", "una mesa más grande", "einen größeren Tisch", "un tavolo più grande", "uma mesa maior", "een grotere tafel", "一张更大的桌子"),
    "our luggage": ("nos bagages", "nuestro equipaje", "unser Gepäck", "i nostri bagagli", "a nossa bagagem", "onze bagage", "我们的行李"),
}  # fmt: skip
SAYINGS_IN = {
    "I need {}": ("J'ai besoin de {}", "Necesito {}", "Ich brauche {}", "Ho bisogno di {}", "Preciso de {}", "Ik heb {} nodig", "我需要{}"),
    "Where is {}?": ("Où est {} ?", "¿Dónde está {}?", "Wo ist {}?", "Dov'è {}?", "Onde está {}?", "Waar is {}?", "{}在哪里？"),
    "We asked for {}": ("Nous avons demandé {}", "Pedimos {}", "Wir haben um {} gebeten", "Abbiamo chiesto {}", "Pedimos {}", "Wij hebben om {} gevraagd", "我们要求了{}"),
    "Please bring {}": ("Apportez {}, s'il vous plaît", "Traiga {}, por favor", "Bitte bringen Sie {}", "Porti {}, per favore", "Traga {}, por favor", "Breng {}, alstublieft", "请拿来{}"),
    "Can I have {} {day}?": ("Puis-je avoir {} {day} ?", "¿Puedo tener {} {day}?", "Kann ich {day} {} haben?", "Posso avere {} {day}?", "Posso ter {} {day}?", "Mag ik {} {day}?", "{day}我可以要{}吗？"),
}  # fmt: skip
DAYS_IN = {
    "today": ("aujourd'hui", "hoy", "heute", "oggi", "hoje", "vandaag", "今天"),
    "tomorrow": ("demain", "mañana", "morgen", "domani", "amanhã", "morgen", "明天"),
    "on Monday": ("lundi", "el lunes", "am Montag", "lunedì", "na segunda-feira", "maandag", "星期一"),
    "on Friday": ("vendredi", "el viernes", "am Freitag", "venerdì", "na sexta-feira", "vrijdag", "星期五"),
}
