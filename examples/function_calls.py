"""Requests in plain English and the function call each one asks for: the data of the demo.

Ten functions of a household assistant. The held-out set shares with the training set neither a sentence pattern
nor an argument value: every pool below is split in two, and `heldout` draws only from the second half. So a right
answer there means that the model learnt to read a request, not that it remembers one.

    python examples/function_calls.py DIRECTORY     # writes train.jsonl and heldout.jsonl there
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

SYSTEM = "Answer in JSON."

# kind of value → (values for training, values for the held-out set)
POOLS: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {
    "number": ([n for n in range(2, 100) if n % 7 != 3], [n for n in range(2, 100) if n % 7 == 3]),
    "amount": ([n for n in range(100, 3000, 5) if n % 35], [n for n in range(100, 3000, 5) if n % 35 == 0]),
    "label": (
        ["pasta", "eggs", "laundry", "tea", "bread", "meditation", "homework", "pizza", "nap", "plank",
         "rice",
         "dishwasher", "reading", "study break", "roast chicken", "face mask", "stretching", "cookies",
         "soup", "ironing", "sauna", "hair dye", "charcoal grill", "cake", "dough", "muffins", "spin cycle",
         "power nap", "chess move", "quiz", "beans", "steak", "tea break", "shower", "debate", "warm up",
         "green tea", "glue", "sprint", "ice bath"],
        ["potatoes", "yoga", "lasagne", "workout", "banana cake", "piano practice", "gravy", "carrots",
         "plank hold", "hot bath"],
    ),
    "person": (
        ["Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ines", "Jack", "Karim", "Laura",
         "Mum", "Dad", "Mr Brown", "Dr Patel", "Noah", "Olivia", "Priya", "Sam", "Tom", "my sister",
         "my boss",
         "Leo", "Maria", "Nils", "Oscar", "Paula", "Quentin", "Rosa", "Stefan", "Tina", "Umar", "Vera",
         "William", "Xavier", "Zoe", "Aunt Julia", "Uncle Pete", "Mrs White", "Dr Kim", "Coach Miller",
         "my wife", "my landlord", "my neighbour", "the plumber", "Giulia", "Bjorn", "Chen", "Fatima",
         "Dominic",
         "Domenica", "Gustavo"],
        ["Rachel", "Diego", "Mrs Green", "Hannah", "Victor", "my brother", "Yuki", "Grandma", "Peter", "Susan",
         "Uncle Bob", "my dentist"],
    ),
    "text": (
        ["I am on my way", "the meeting is cancelled", "happy birthday", "can you call me back",
         "dinner is ready",
         "I forgot my keys", "see you tomorrow", "please buy some milk", "the train is late",
         "good luck today",
         "where is the car", "I miss you", "thank you for your help", "the door is open",
         "we need more coffee",
         "what time is it", "I will be there soon", "the package has arrived", "let us meet at the station",
         "my phone is broken", "congratulations on the new job", "do you want to have lunch",
         "the baby is awake", "I lost my wallet", "our team won", "the shop is closed", "bring a warm jacket",
         "sorry for the noise", "I love this song", "the soup was too salty", "we are out of bread",
         "can I borrow your bike", "my train leaves at noon", "good night", "nice to meet you",
         "the water is cold", "how are you", "call the doctor", "the bill is paid", "let me think about it",
         "I have a question", "is this seat free", "the light is red", "sorry to bother you",
         "it was great last week", "I am lost", "the book is on the table", "never mind"],
        ["I will be ten minutes late", "the cat is asleep", "sorry about last night", "where is the library",
         "the kids are at school", "good morning everyone", "my flight has landed", "how much does it cost",
         "we won the game", "the shower is broken", "come over at eight", "I left my bag at work"],
    ),
    "city": (
        ["London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Tokyo", "Chicago", "Boston",
         "Seattle",
         "Dublin", "Athens", "Cairo", "Mumbai", "Sydney", "Toronto", "Lima", "Nairobi", "Seoul", "New York",
         "San Francisco", "Cape Town", "Prague", "Zurich", "Denver",
         "Bogota", "Buenos Aires", "Bucharest", "Warsaw", "Krakow", "Hamburg", "Lyon", "Naples", "Porto",
         "Seville", "Geneva", "Brussels", "Bruges", "Copenhagen", "Stockholm", "Reykjavik", "Beijing",
         "Shanghai", "Hanoi", "Jakarta", "Manila", "Delhi", "Dubai", "Tel Aviv", "Marrakesh", "Accra",
         "Lagos",
         "Dallas", "Houston", "Miami", "New Orleans", "San Diego", "Las Vegas", "Portland", "Vancouver",
         "Havana", "Santiago", "Auckland", "Perth", "Glasgow", "Leeds", "Salt Lake City"],
        ["Lisbon", "Helsinki", "Montreal", "Budapest", "Los Angeles", "Munich", "Bangkok", "Edinburgh"],
    ),
    "day": (
        ["today", "tomorrow", "Monday", "Tuesday", "Thursday", "Saturday", "tonight", "next Monday",
         "next Friday",
         "this weekend"],
        ["Wednesday", "Sunday", "Friday", "next Tuesday"],
    ),
    "time": (
        [f"{h} {m}" for m in ("am", "pm") for h in (1, 2, 3, 4, 6, 8, 9, 10, 12)],
        [f"{h} {m}" for m in ("am", "pm") for h in (5, 7, 11)],
    ),
    "currency": (
        ["USD", "EUR", "GBP", "JPY", "CAD", "AUD", "INR", "BRL", "CNY", "NOK", "PLN", "TRY", "KRW", "SGD",
         "THB", "HUF", "CZK", "ILS", "EGP", "CLP", "COP", "PHP", "IDR", "MYR", "TWD", "VND", "NGN", "KES",
         "UAH",
         "ISK", "HKD", "RON", "ARS", "PEN"],
        ["CHF", "SEK", "MXN", "NZD", "DKK", "ZAR"],
    ),
    "artist": (
        ["Adele", "Queen", "Miles Davis", "Nina Simone", "Radiohead", "Mozart", "Daft Punk", "Bob Marley",
         "Björk",
         "The Beatles", "Johnny Cash", "Shakira", "Vivaldi", "Aretha Franklin", "Coldplay", "Fela Kuti",
         "Pink Floyd", "Chopin", "Elvis Presley", "Abba",
         "Prince", "Madonna", "Bob Dylan", "Louis Armstrong", "Duke Ellington", "Schubert", "Brahms",
         "Debussy",
         "Handel", "Metallica", "Blur", "Oasis", "U2", "Sting", "Rihanna", "Beyoncé", "Kraftwerk",
         "Depeche Mode", "The Cure", "The Clash", "Joni Mitchell", "Leonard Cohen", "Ray Charles", "Santana",
         "Tina Turner", "Whitney Houston", "Nick Cave", "Björn Again", "Talking Heads", "Massive Attack"],
        ["David Bowie", "Beethoven", "Ella Fitzgerald", "Nirvana", "Stevie Wonder", "Bach", "Michael Jackson",
         "Ravel", "The Doors"],
    ),
    "room": (
        ["kitchen", "bedroom", "living room", "garage", "bathroom", "office", "garden", "hallway", "attic",
         "guest room",
         "laundry room", "sunroom", "porch", "library", "pantry", "workshop", "cellar", "balcony", "playroom",
         "conservatory", "gym", "entrance hall", "staircase", "sauna", "shed", "studio", "lounge", "terrace",
         "sitting room", "family room", "music room", "utility room", "reading corner", "dressing room",
         "drawing room", "waiting room", "loft"],
        ["basement", "dining room", "study", "nursery", "wine cellar", "storage room", "front yard", "cloakroom",
         "boiler room", "greenhouse", "barn", "guest house"],
    ),
    "title": (
        ["dentist", "team meeting", "yoga class", "lunch with Ben", "piano lesson", "budget review",
         "haircut",
         "parents evening", "book club", "job interview", "car inspection", "board meeting", "date night",
         "football practice", "doctor visit", "project kickoff", "house viewing", "guitar lesson",
         "parent call", "flu shot", "tax advisor", "oil change", "theatre night", "karate class",
         "choir practice", "product demo", "sprint planning", "lab visit", "ski trip", "birthday party",
         "tennis match", "cooking class", "town hall", "code review", "dog training", "farewell drinks",
         "mortgage meeting", "school concert", "coffee with Zoe", "driving test", "family dinner",
         "poker night",
         "museum tour"],
        ["eye test", "wedding rehearsal", "sales call", "swimming lesson", "vet appointment", "chess club",
         "passport office", "garden party", "spelling bee"],
    ),
    "language": (
        ["French", "Spanish", "German", "Italian", "Japanese", "Russian", "Arabic", "Hindi", "Polish",
         "Korean",
         "Dutch", "Greek", "Welsh", "Thai",
         "Czech", "Danish", "Norwegian", "Hungarian", "Romanian", "Ukrainian", "Hebrew", "Persian", "Urdu",
         "Bengali", "Burmese", "Indonesian", "Malay", "Swahili", "Zulu", "Irish", "Catalan", "Basque",
         "Latin", "Croatian", "Serbian", "Icelandic", "Estonian", "Tagalog", "Punjabi", "Nepali"],
        ["Portuguese", "Swedish", "Turkish", "Chinese", "Finnish", "Bulgarian", "Mongolian", "Slovak"],
    ),
    "cuisine": (
        ["Italian", "Mexican", "Indian", "Polish", "Thai", "French", "Greek", "vegan", "sushi", "seafood",
         "Spanish", "Japanese", "tapas", "burger", "Korean", "steak",
         "Brazilian", "Peruvian", "Argentinian", "Moroccan", "Egyptian", "Persian", "German", "Austrian",
         "Swiss", "Cuban", "Jamaican", "noodle", "dumpling", "kebab", "fried chicken", "salad", "gluten free",
         "fish", "curry", "breakfast", "dim sum", "Nepalese", "Russian", "Indonesian", "fondue", "falafel",
         "oyster", "soul food", "Hawaiian", "soup"],
        ["Ethiopian", "Vietnamese", "ramen", "Lebanese", "vegetarian", "barbecue", "Belgian", "Cajun",
         "soup dumpling"],
    ),
    "device": (
        ["lamp", "heater", "fan", "television", "radio", "coffee machine", "air conditioner", "ceiling light",
         "speaker", "oven", "kettle", "washing machine", "dehumidifier", "desk lamp", "printer",
         "table fan", "night light", "string lights", "wall lamp", "reading lamp", "dishwasher", "stove",
         "microwave", "freezer", "fridge", "vacuum cleaner", "robot vacuum", "sprinkler", "fireplace",
         "electric blanket", "hair dryer", "alarm", "doorbell camera", "security camera", "computer",
         "monitor",
         "router", "game console", "record player", "stereo", "subwoofer", "electric piano", "pump",
         "water heater", "floor heating", "light strip", "bread maker"],
        ["humidifier", "projector", "toaster", "floor lamp", "air purifier", "blender", "ice machine",
         "smart speaker", "sewing machine"],
    ),
    "place": (
        ["the airport", "the office", "Central Station", "the hospital", "City Hall", "the museum",
         "the mall",
         "12 Oak Street", "the university", "Hotel Plaza", "the harbour", "the cinema", "48 Park Avenue",
         "the library", "the north gate", "Union Square", "home", "my hotel", "the gym",
         "the market", "the beach", "the embassy", "the courthouse", "the old bridge", "the ferry",
         "the train station", "the bus stop", "my parents house", "the dentist", "Gate 12", "Terminal 3",
         "5 Elm Road", "160 River Street", "9 Church Lane", "31 High Street", "Liberty Square", "Queens Road",
         "Kings Road", "Sunset Boulevard", "Golden Park", "Albert Hall", "Rose Cottage", "Hotel Astoria",
         "the Grand Hotel", "the castle", "the stables", "the campsite", "Central Park", "Times Square"],
        ["the stadium", "Kings Cross", "77 Mill Road", "the theatre", "the zoo", "Victoria Park", "the bakery",
         "24 Hill Street", "the opera", "Baker Street"],
    ),
}

# function → (argument: kind of value), sentence patterns for training, sentence patterns for the held-out set
FUNCTIONS: dict[str, tuple[dict[str, str], list[str], list[str]]] = {
    "set_timer": (
        {"minutes": "number", "label": "label"},
        ["set a timer for {minutes} minutes for the {label}", "{label} timer, {minutes} minutes",
         "start a {minutes} minute timer called {label}", "count down {minutes} minutes for {label}",
         "remind me about {label} in {minutes} minutes", "I need {minutes} minutes on the clock for {label}",
         "timer: {label}, {minutes} min", "set the {label} timer to {minutes} minutes",
         "give me {minutes} minutes for {label}", "time {minutes} minutes of {label}",
         "put {minutes} minutes on a timer named {label}", "wake me from {label} after {minutes} minutes",
         "the {label} will take {minutes} minutes, count them", "{minutes} minutes, {label}, go",
         "how about a timer of {minutes} minutes for {label}",
         "when {minutes} minutes have passed, tell me about {label}", "{label} should ring in {minutes} minutes",
         "alarm in {minutes} minutes: {label}"],
        ["let me know when {minutes} minutes of {label} are over",
         "the {label} needs {minutes} minutes, start a timer",
         "run a {label} countdown of {minutes} minutes", "{minutes} minute timer for {label}"],
    ),
    "send_message": (
        {"to": "person", "text": "text"},
        ["send a message to {to} saying {text}", "text {to}: {text}", "tell {to} {text}",
         "tell {to} that {text}",
         "message {to} and say {text}", "write to {to}: {text}", "let {to} know: {text}",
         "send {to} this: {text}", "SMS to {to}, {text}", "say {text} to {to}", "drop {to} a line: {text}",
         "I want to text {to} the words {text}", "send \"{text}\" to {to}",
         "ask {to}: {text}", "could {to} be told that {text}", "quick note to {to}: {text}",
         "my message is {text}, it goes to {to}", "reply to {to} with {text}", "inform {to} that {text}",
         "for {to}: {text}", "{to} needs to hear this: {text}"],
        ["shoot {to} a text that says {text}", "{to} should get this message: {text}",
         "please pass on to {to}: {text}", "new message for {to}: {text}"],
    ),
    "get_weather": (
        {"city": "city", "day": "day"},
        ["what is the weather in {city} {day}", "weather in {city} for {day}", "will it rain in {city} {day}",
         "{city} forecast for {day}", "how warm will it be {day} in {city}",
         "do I need an umbrella in {city} {day}",
         "show me the weather for {day} in {city}", "is it going to be sunny in {city} {day}",
         "tell me the forecast for {city}, {day}", "how cold is {city} {day}",
         "{day} in {city}: what will the weather be like", "check the weather {day} for {city}",
         "I travel to {city} {day}, will it be windy", "should I take a coat to {city} {day}",
         "{city}, {day}: rain or sun", "what is it like outside in {city} {day}", "will {city} be hot {day}",
         "how many degrees will {city} have {day}"],
        ["will there be snow in {city} {day}", "I am in {city} {day}, what weather should I expect",
         "temperature in {city} {day}", "give me {city}'s weather for {day}"],
    ),
    "convert_currency": (
        {"amount": "amount", "from": "currency", "to": "currency"},
        ["convert {amount} {from} to {to}", "how much is {amount} {from} in {to}", "{amount} {from} in {to}",
         "what is {amount} {from} worth in {to}", "change {amount} {from} into {to}",
         "{amount} {from} to {to} please",
         "I have {amount} {from}, how many {to} is that", "exchange {amount} {from} for {to}",
         "give me the value of {amount} {from} in {to}", "turn {amount} {from} into {to}",
         "how many {to} do I get for {amount} {from}", "price in {to} of {amount} {from}",
         "I paid {amount} {from}, tell me the {to}", "{amount} {from} equals how much {to}",
         "if something costs {amount} {from}, how much {to} is it", "compute {amount} {from} to {to}",
         "what would {amount} {from} be as {to}", "need {to} for my {amount} {from}"],
        ["if I pay {amount} {from}, what is it in {to}", "calculate {amount} {from} as {to}",
         "I want to swap {amount} {from} for {to}", "express {amount} {from} in {to}"],
    ),
    "play_music": (
        {"artist": "artist", "room": "room"},
        ["play {artist} in the {room}", "put on some {artist} in the {room}",
         "I want to hear {artist} in the {room}",
         "start {artist} on the {room} speakers", "play songs by {artist} in the {room}",
         "{room}: play {artist}", "some {artist} in the {room} please", "let the {room} listen to {artist}",
         "shuffle {artist} in the {room}", "music by {artist} for the {room}",
         "listen to {artist} in the {room}", "stream {artist} to the {room}",
         "I would love some {artist} while I am in the {room}", "turn {artist} up in the {room}",
         "the {room} needs music, {artist}", "get {artist} going in the {room}",
         "I feel like {artist} today, play it in the {room}", "{artist} in the {room}, loud",
         "may we hear {artist} in the {room}", "I am sitting in the {room} and want {artist} songs",
         "let {artist} sing in the {room}", "make the {room} sound like {artist}"],
        ["blast {artist} in the {room}", "I am in the {room}, play something by {artist}",
         "fill the {room} with {artist}", "can we have {artist} on in the {room}"],
    ),
    "create_event": (
        {"title": "title", "day": "day", "time": "time"},
        ["add {title} to my calendar {day} at {time}", "schedule {title} for {day} at {time}",
         "create an event: {title}, {day}, {time}", "put {title} on my calendar for {day} at {time}",
         "I have {title} {day} at {time}", "book {title} in my calendar {day} {time}",
         "{title} {day} at {time}, add it", "new appointment {day} at {time}: {title}",
         "plan {title} at {time} {day}", "note that {title} is {day} at {time}",
         "block {day} {time} for {title}", "set up {title} {day} at {time}",
         "do not let me forget {title} {day} at {time}", "{day} {time}: {title}",
         "there will be {title} {day} at {time}", "remember {title}, it is {day} at {time}",
         "my {title} is {day} at {time}, write it down", "reserve {day} at {time} for {title}"],
        ["make a calendar entry for {title} {day} at {time}", "save the date: {title}, {day} at {time}",
         "there is {title} {day} at {time}, put it in my diary", "calendar: {title} at {time} {day}"],
    ),
    "translate_text": (
        {"text": "text", "language": "language"},
        ["translate {text} into {language}", "how do you say {text} in {language}", "{text} in {language}",
         "what is {text} in {language}", "translate to {language}: {text}", "say {text} in {language}",
         "give me the {language} for {text}", "I need {text} in {language}", "put {text} into {language}",
         "{language} translation of {text}", "what is the {language} for {text}",
         "turn {text} into {language}",
         "say this in {language}: {text}", "my friend speaks {language}, tell her {text}",
         "what do people say in {language} for {text}", "{text} but in {language}", "{language}: {text}",
         "I want to know the {language} words for {text}", "help me say {text} in {language}",
         "in {language}, what is {text}"],
        ["how would someone say {text} in {language}", "please translate this to {language}: {text}",
         "{language} version of: {text}", "write {text} in {language}"],
    ),
    "find_restaurant": (
        {"cuisine": "cuisine", "city": "city"},
        ["find a {cuisine} restaurant in {city}", "where can I eat {cuisine} food in {city}",
         "best {cuisine} place in {city}", "I want {cuisine} food in {city}",
         "{cuisine} restaurants in {city}",
         "look for {cuisine} food in {city}", "show me {cuisine} restaurants near {city}",
         "is there a good {cuisine} restaurant in {city}", "we are hungry for {cuisine} in {city}",
         "recommend a {cuisine} place in {city}", "dinner in {city}, {cuisine} please",
         "search for {cuisine} restaurants around {city}",
         "where do they cook {cuisine} food in {city}", "is there any {cuisine} near {city}",
         "I could eat {cuisine} now, I am in {city}", "list {cuisine} restaurants, city {city}",
         "take me to a {cuisine} restaurant in {city}", "who makes good {cuisine} food in {city}",
         "I would like to try {cuisine} food, we are in {city}", "name one {cuisine} place in {city}"],
        ["I am in {city} and fancy {cuisine} food", "which {cuisine} restaurant should I try in {city}",
         "get me a list of {cuisine} places in {city}", "somewhere to have {cuisine} food in {city}"],
    ),
    "turn_on_device": (
        {"device": "device", "room": "room"},
        ["turn on the {device} in the {room}", "switch the {room} {device} on",
         "switch on the {device} in the {room}",
         "{device} on in the {room}", "start the {device} in the {room}",
         "turn the {device} in the {room} on",
         "power on the {room} {device}", "I need the {device} on in the {room}",
         "enable the {device} in the {room}", "{room}: {device} on",
         "the {device} in the {room} should be on",
         "could the {device} in the {room} go on",
         "the {room} is where I want the {device} on", "let the {device} in the {room} run",
         "put the {room} {device} on", "I want the {device} of the {room} on",
         "we need the {device} working in the {room}", "is the {device} in the {room} off? turn it on",
         "use the {device} in the {room}", "go and start the {room} {device}"],
        ["get the {device} in the {room} running", "activate the {room} {device}",
         "please put the {device} on in the {room}", "make sure the {device} in the {room} is on"],
    ),
    "book_ride": (
        {"from": "place", "to": "place"},
        ["book a ride from {from} to {to}", "get me a taxi from {from} to {to}",
         "I need a car from {from} to {to}",
         "cab to {to} from {from}", "take me from {from} to {to}", "order a taxi at {from} going to {to}",
         "ride from {from} to {to} please", "pick me up at {from} and drive me to {to}",
         "call a cab, {from} to {to}", "find a driver from {from} to {to}",
         "I want to go from {from} to {to} by taxi", "taxi: {from} to {to}",
         "I am at {from} and need a lift to {to}", "a driver should bring me to {to} from {from}",
         "we are leaving {from} for {to}, find us a cab", "from {from} I must go to {to}, call a car",
         "get a car that goes to {to}, starting at {from}", "my trip: {from} to {to}, order a cab",
         "I am waiting at {from}, drive me to {to}", "transport from {from} to {to}"],
        ["send a car to {from}, I am going to {to}", "can someone drive me from {from} to {to}",
         "reserve a taxi between {from} and {to}", "I have to get from {from} to {to}, get me a cab"],
    ),
}  # fmt: skip

# In training some values are made up, of syllables or of everyday words: what was never a value before can only be
# copied from the request, and that is what the held-out set asks for.
INVENTED: dict[str, list[str]] = {
    "person": ["{0}", "{0}", "Mrs {0}", "{0} {1}"],
    "city": ["{0}", "{0}", "{0} {1}"],
    "artist": ["{0}", "{0} {1}", "The {0}"],
    "place": ["{n} {0} Street", "the {0}", "{0} {1}"],
    "room": ["{0}", "{0}", "{0} room", "{0} {1}"],
    "label": ["{0}", "{0} {1}"],
    "title": ["{0}", "{0} {1}"],
    "device": ["{0}", "{0} {1}"],
    "language": ["{0}"],
    "cuisine": ["{0}", "{0} {1}"],
    "currency": ["{code}"],
    "text": ["the {0} is {1}", "I {0} my {1} at {2}", "{0} {1}", "we {0} the {1} {2} on {3}", "{0} with {1} about {2}"],
}
INVENTED_SHARE = 0.4
CAPITALISED = ("person", "city", "artist", "place", "language")
WORDS = """apple anchor arrow bamboo barrel basket beacon blanket bottle branch bridge bronze bucket button cabin camera
candle canyon carpet castle cedar chapel cherry circle cliff clover copper cotton cradle crystal curtain dagger desert
diamond donkey dragon eagle engine feather ferry fiddle finger forest fossil fountain furnace gallery ginger glacier
granite hammer harvest helmet hollow honey hunter island jacket jungle kettle ladder lantern leather lemon lizard magnet
marble market meadow mirror monkey morning mountain museum needle ocean orange orchid oyster paddle palace panther paper
pebble pepper pillow planet pocket pony puzzle quarry rabbit ribbon river rocket saddle sailor shadow shelter shoulder
silver spider spirit station stone summer sunset temple thunder ticket timber tower tunnel turtle valley velvet village
violet walnut whisper willow window winter wizard wonder yellow zebra""".split()  # noqa: SIM905

OPENINGS = (
    ["", "", "", "", "please ", "hey, ", "can you ", "could you please ", "hi, ", "ok, ", "quick: ",
     "I said "],
    ["", "", "", "hello, ", "well, "],
)


def invented(rng: random.Random, kind: str) -> str:
    """A value of made-up or everyday words, in a shape of its kind."""
    words = []
    for _ in range(4):
        parts = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))]
        made_up = "".join(parts) + rng.choice(["", "n", "r", "s", "l", "x"])
        word = made_up if rng.random() < 0.4 and kind != "text" else rng.choice(WORDS)
        words.append(word.capitalize() if kind in CAPITALISED else word)
    code = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=3))
    return rng.choice(INVENTED[kind]).format(*words, n=rng.choice(POOLS["number"][0]), code=code)


def value(rng: random.Random, kind: str, half: int, taken: Collection[Any]) -> Any:
    """A value of this kind from the pool of this half, none of those `taken`; in training sometimes invented."""
    if half == 0 and kind in INVENTED and rng.random() < INVENTED_SHARE:
        made = invented(rng, kind)
        if made not in POOLS[kind][1]:
            return made
    return rng.choice([v for v in POOLS[kind][half] if v not in taken])


def example(rng: random.Random, function: str, half: int) -> dict[str, list[dict[str, str]]]:
    """One chat of system, user and assistant; `half` is 0 for training and 1 for held-out pools."""
    kinds, *patterns = FUNCTIONS[function]
    values: dict[str, Any] = {}
    for argument, kind in kinds.items():
        values[argument] = value(rng, kind, half, values.values())
    request = rng.choice(OPENINGS[half]) + rng.choice(patterns[half]).format(**values)
    if rng.random() < 0.7:
        request = request[0].upper() + request[1:]
    request += rng.choice(["", "", ".", "?", "!"])
    call = json.dumps({"name": function, "arguments": values}, separators=(",", ":"), ensure_ascii=False)
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": request},
            {"role": "assistant", "content": call},
        ]
    }


def _generate(seed: int, size: int, half: int) -> list[dict[str, list[dict[str, str]]]]:
    """`size` different chats, the functions in equal shares and in random order."""
    rng = random.Random(f"{seed}-{half}")
    names = list(FUNCTIONS)
    rows: list[dict[str, list[dict[str, str]]]] = []
    seen: set[str] = set()
    while len(rows) < size:
        row = example(rng, names[len(rows) % len(names)], half)
        request = row["messages"][1]["content"]
        if request not in seen:
            seen.add(request)
            rows.append(row)
    rng.shuffle(rows)
    return rows


def train(seed: int = 0, size: int = 600) -> list[dict[str, list[dict[str, str]]]]:
    """Training examples, the same for the same seed."""
    return _generate(seed, size, 0)


def heldout(seed: int = 0, size: int = 80) -> list[dict[str, list[dict[str, str]]]]:
    """Held-out examples: other sentence patterns, other openings and other values than `train`."""
    return _generate(seed, size, 1)


if __name__ == "__main__":
    directory = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train()), ("heldout", heldout())):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
