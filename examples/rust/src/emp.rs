//! A client of EMP/1, the Edge Module Protocol of edgezmq (docs/emp.md). Copy this file into a module of your own; it
//! needs the crates `zmq`, `rmpv` and `uuid`.
//!
//! One thread, one message at a time: [`Client::turn`] reads, handles at most one message and returns. So a handler must
//! not wait for another module's answer. Nothing has to be stored: what was sent is kept until the broker says that it
//! is settled, and sent again after every reconnect.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, fmt, process};

use rmpv::Value;
use uuid::Uuid;

const LIVENESS: Duration = Duration::from_secs(15);
const HELLO_AGAIN: Duration = Duration::from_millis(500);
/// For a module to finish what it has in hand.
pub const DRAIN: Duration = Duration::from_secs(8);
/// Unsettled messages of a lane; the broker's own limit is taken when it is lower.
const WINDOW: usize = 1024;
/// Told in one PING.
const MAX_FLOORS: usize = 1024;
/// Of lanes towards us, and as many senders.
const MAX_BOOKS: usize = 4096;
const MAX_BATCH: u64 = 1024;

const EXPECTS_REPLY: u64 = 1;
const REPLY: u64 = 2;
const RESENT: u64 = 4;
const REDELIVERED: u64 = 16;
const FROM_STORE: u64 = 32;

/// The class of a lane; lower ones are delivered first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(dead_code)]
pub enum Priority {
    Signal = 2,
    Data = 3,
}

const REPLY_PRIORITY: u64 = 0;

/// Why a client cannot go on.
#[derive(Debug)]
pub enum Error {
    /// A newer process has our name: exit.
    Fenced,
    /// The broker does not take us.
    Refused(String),
    Zmq(zmq::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Fenced => write!(f, "a newer process has our name"),
            Error::Refused(why) => write!(f, "the broker does not take us: {why}"),
            Error::Zmq(fault) => write!(f, "{fault}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<zmq::Error> for Error {
    fn from(fault: zmq::Error) -> Self {
        Error::Zmq(fault)
    }
}

/// Why a message was not given to its lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotSent {
    /// The lane's window is full: try again after a turn.
    Full,
    /// Larger than the broker allows.
    TooLarge,
}

/// KubeEdge's message as it stands on the bus. `kind` says what `content` is: json, text or bytes.
#[derive(Clone, Debug, Default)]
pub struct Message {
    pub id: String,
    pub parent_id: String,
    /// Milliseconds since 1970.
    pub timestamp: i64,
    pub resource_version: String,
    /// Claimed; [`Delivery::sender`] is vouched for.
    pub source: String,
    pub group: String,
    pub resource: String,
    pub operation: String,
    pub kind: String,
    pub content: Vec<u8>,
}

/// A message for us, and what the broker says of it.
#[derive(Clone, Debug)]
pub struct Delivery {
    pub message: Message,
    pub sender: String,
    pub expects_reply: bool,
    /// It may have been handled before.
    #[allow(dead_code)] // for handlers that must not do a thing twice
    pub redelivered: bool,
}

/// What a handler made of a delivery: done, with the reply's content for a request, or the reason why it is refused.
pub type Outcome = Result<Option<Vec<u8>>, String>;

/// What became of a message of ours: `refused` is None when it was handled.
#[derive(Debug)]
pub struct Settled {
    pub destination: String,
    pub number: u64,
    pub refused: Option<String>,
}

/// Where the bus is, by the environment.
pub fn endpoint() -> String {
    let set = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    set("EDGEZMQ_BUS").unwrap_or_else(|| {
        let state = || {
            let home = || set("HOME").unwrap_or_default() + "/.local/state";
            set("XDG_STATE_HOME").filter(|path| path.starts_with('/')).unwrap_or_else(home)
        };
        let home = set("EDGEZMQ_HOME").unwrap_or_else(|| state() + "/edgezmq");
        format!("ipc://{home}/run/bus.sock")
    })
}

struct Batch {
    number: u64,
    flags: u64,
    requester: Option<Vec<u8>>,
    body: Vec<u8>,
}

/// One way to a destination: what is not settled yet, in order.
struct Lane {
    next: u64,
    open: VecDeque<Batch>,
    bytes: usize,
}

impl Lane {
    fn floor(&self) -> u64 {
        self.open.front().map_or(self.next, |batch| batch.number)
    }
}

/// What is known of one lane towards us: all up to `high`, outcomes of all up to `done` (handled in order).
struct Book {
    base: u64,
    high: u64,
    done: u64,
    failed: BTreeMap<u64, String>,
    session: Option<u64>,
    lane: u64,
    session_high: u64,
    told: u64,
    /// The number of the last DELIVER that was for it.
    used: u64,
}

impl Book {
    /// All that came has its outcome.
    fn is_idle(&self) -> bool {
        self.done == self.high
    }
}

type LaneKey = (String, u64);
/// Sender (the broker vouches for it; an incarnation others can say too), incarnation, destination, priority.
type BookKey = (String, Vec<u8>, String, u64);

struct Work {
    book: BookKey,
    number: u64,
    /// None: the body did not hold it.
    delivery: Option<Delivery>,
    incarnation: Vec<u8>,
    is_reply: bool,
}

struct Limits {
    message: usize,
    window: usize,
    window_bytes: usize,
}

pub struct Client {
    socket: zmq::Socket,
    name: String,
    incarnation: [u8; 16],
    epoch: Vec<u8>,
    session: Option<u64>,
    generation: u64,
    heartbeat: Duration,
    limits: Limits,
    attached: bool,
    draining: bool,
    nonce: u64,
    /// When the PING went that has no PONG.
    pinged: Option<Instant>,
    ping_due: Instant,
    hello_due: Instant,
    taken_since: Option<Instant>,
    /// When the last answered PING was sent.
    fresh: Option<Instant>,
    lanes: HashMap<LaneKey, Lane>,
    books: HashMap<BookKey, Book>,
    generations: HashMap<String, u64>,
    /// How many DELIVERs came.
    delivered: u64,
    work: VecDeque<Work>,
    settled: Vec<Settled>,
}

impl Client {
    /// Begin to connect; [`Client::turn`] does the rest.
    pub fn connect(context: &zmq::Context, name: &str, endpoint: &str) -> Result<Self, Error> {
        let socket = context.socket(zmq::DEALER)?;
        socket.set_immediate(true)?;
        socket.set_linger(1000)?;
        socket.set_sndhwm(0)?;
        socket.set_rcvhwm(0)?;
        socket.set_reconnect_ivl(20)?;
        socket.set_reconnect_ivl_max(500)?;
        socket.connect(endpoint)?;
        let now = Instant::now();
        Ok(Client {
            socket,
            name: name.to_owned(),
            incarnation: *Uuid::new_v4().as_bytes(),
            epoch: Vec::new(),
            session: None,
            generation: 0,
            heartbeat: Duration::from_secs(1),
            limits: Limits { message: 1 << 20, window: 64, window_bytes: 1 << 20 },
            attached: false,
            draining: false,
            nonce: 0,
            pinged: None,
            ping_due: now,
            hello_due: now,
            taken_since: None,
            fresh: None,
            lanes: HashMap::new(),
            books: HashMap::new(),
            generations: HashMap::new(),
            delivered: 0,
            work: VecDeque::new(),
            settled: Vec::new(),
        })
    }

    /// Give the message to its lane; its number there. An empty id is made, an empty kind is json.
    pub fn send(&mut self, destination: &str, priority: Priority, message: &Message) -> Result<u64, NotSent> {
        let body = encode(message);
        let lane = self.lanes.get(&(destination.to_owned(), priority as u64));
        let (count, bytes) = lane.map_or((0, 0), |lane| (lane.open.len(), lane.bytes));
        if body.len() > self.limits.message {
            return Err(NotSent::TooLarge);
        }
        if count > 0 && (count >= self.limits.window || bytes + body.len() > self.limits.window_bytes) {
            return Err(NotSent::Full);
        }
        Ok(self.enqueue((destination.to_owned(), priority as u64), 0, None, body))
    }

    /// What became of messages of ours since the last call.
    pub fn settled(&mut self) -> Vec<Settled> {
        std::mem::take(&mut self.settled)
    }

    /// Whether nothing of ours is unsettled.
    pub fn is_idle(&self) -> bool {
        self.lanes.values().all(|lane| lane.open.is_empty())
    }

    /// Ask for nothing new. Go on with turns until [`Client::is_idle`], or as long as there is time, then close.
    pub fn drain(&mut self) {
        if !self.draining && self.attached {
            self.put("DRAIN/1", vec![(DRAIN.as_millis() as u64).into()], None);
        }
        self.draining = true;
    }

    /// Say BYE.
    pub fn close(mut self) {
        if self.attached {
            self.put("BYE/1", vec![false.into()], None);
        }
    }

    /// Read what there is, keep up with the broker, handle at most one message. Waits at most `wait`.
    pub fn turn(&mut self, wait: Duration, handle: &mut dyn FnMut(&Delivery) -> Outcome) -> Result<(), Error> {
        let now = Instant::now();
        if self.attached && self.pinged.is_some_and(|at| now - at > LIVENESS) {
            self.attached = false; // no PONG
        }
        if !self.attached && now >= self.hello_due {
            self.hello(now);
        } else if self.attached && self.pinged.is_none() && now >= self.ping_due {
            self.ping(now);
        }
        let due = match (self.attached, self.pinged) {
            (false, _) => self.hello_due,
            (true, None) => self.ping_due,
            (true, Some(at)) => at + LIVENESS,
        };
        let wait = if self.may_work() { Duration::ZERO } else { wait.min(due.saturating_duration_since(now)) };
        match self.socket.poll(zmq::POLLIN, wait.as_millis() as i64) {
            Ok(_) | Err(zmq::Error::EINTR) => {}
            Err(fault) => return Err(fault.into()),
        }
        loop {
            // Everything that is there: before anything is handled (rule 21).
            match self.socket.recv_multipart(zmq::DONTWAIT) {
                Ok(frames) => self.read(&frames)?,
                Err(zmq::Error::EAGAIN | zmq::Error::EINTR) => break,
                Err(fault) => return Err(fault.into()),
            }
        }
        if self.may_work() {
            self.work_one(handle);
        }
        Ok(())
    }

    fn may_work(&self) -> bool {
        let is_fresh = self.fresh.is_some_and(|at| at.elapsed() <= LIVENESS);
        is_fresh && self.work.front().is_some_and(|work| !self.draining || work.is_reply)
    }

    // --- out ---------------------------------------------------------------------------------------

    fn put(&mut self, verb: &str, header: Vec<Value>, body: Option<&[u8]>) {
        let header = pack(&Value::Array(header));
        let mut frames: Vec<&[u8]> = vec![verb.as_bytes(), &header];
        frames.extend(body);
        if self.socket.send_multipart(frames, zmq::DONTWAIT).is_err() {
            self.attached = false; // no connection: WELCOME will bring it again
        }
    }

    fn enqueue(&mut self, key: LaneKey, flags: u64, requester: Option<Vec<u8>>, body: Vec<u8>) -> u64 {
        let lane = self.lanes.entry(key.clone()).or_insert(Lane { next: 1, open: VecDeque::new(), bytes: 0 });
        let number = lane.next;
        lane.next += 1;
        lane.bytes += body.len();
        lane.open.push_back(Batch { number, flags, requester, body });
        if self.attached {
            self.put_open(&key, number);
        }
        number
    }

    /// SEND everything of the lane that is not settled, from `first` on.
    fn put_open(&mut self, key: &LaneKey, first: u64) {
        let Some(mut lane) = self.lanes.remove(key) else { return };
        let floor = lane.floor();
        for batch in lane.open.iter_mut().filter(|batch| batch.number >= first) {
            let header = vec![
                key.0.as_str().into(),
                key.1.into(),
                batch.number.into(),
                1.into(),
                floor.into(),
                batch.flags.into(),
                Value::Nil, // ttl
                batch.requester.clone().map_or(Value::Nil, Value::Binary),
            ];
            self.put("SEND/1", header, Some(&batch.body));
            batch.flags |= RESENT; // if it goes once more
        }
        self.lanes.insert(key.clone(), lane);
    }

    fn hello(&mut self, now: Instant) {
        self.hello_due = now + HELLO_AGAIN;
        let header = vec![
            self.name.as_str().into(),
            Value::Array(vec![]),
            Value::Binary(self.incarnation.to_vec()),
            self.generation.into(),
            (LIVENESS.as_millis() as u64).into(),
            "rust-example".into(),
            1024.into(),
            (4 << 20).into(),
            process::id().into(),
        ];
        self.put("HELLO/1", header, None);
    }

    fn ping(&mut self, now: Instant) {
        self.nonce += 1;
        self.pinged = Some(now);
        self.ping_due = now + self.heartbeat;
        let idle = self.lanes.iter().filter(|(_, lane)| lane.open.is_empty()).take(MAX_FLOORS);
        let floors = idle
            .map(|((to, priority), lane)| Value::Array(vec![to.as_str().into(), (*priority).into(), lane.next.into()]));
        let floors = Value::Array(floors.collect());
        self.put("PING/1", vec![self.nonce.into(), Value::Map(vec![]), floors], None);
    }

    fn acknowledge(&mut self, key: &BookKey) {
        let (Some(book), Some(session)) = (self.books.get_mut(key), self.session) else { return };
        let done = book.done.min(book.session_high);
        if !self.attached || book.session != Some(session) || done <= book.told {
            return;
        }
        let refused = book.failed.range(book.told + 1..=done);
        let refused = refused.map(|(number, why)| Value::Array(vec![(*number).into(), why.as_str().into()])).collect();
        book.told = done;
        let lane = Value::Array(vec![book.lane.into(), done.into(), Value::Array(refused)]);
        self.put("ACK/1", vec![session.into(), Value::Array(vec![lane])], None);
    }

    // --- in ----------------------------------------------------------------------------------------

    fn read(&mut self, frames: &[Vec<u8>]) -> Result<(), Error> {
        let [verb, header, body @ ..] = frames else { return Ok(()) };
        let Some(header) = unpack(header) else {
            eprintln!("emp: {} with a header that cannot be read", String::from_utf8_lossy(verb));
            return Ok(());
        };
        let header = Fields(&header);
        match verb.as_slice() {
            b"WELCOME/1" => self.on_welcome(header),
            b"WHO/1" if self.attached => {
                self.attached = false;
                self.hello(Instant::now());
            }
            b"PONG/1" if self.pinged.is_some() && header.int(0) == self.nonce => self.fresh = self.pinged.take(),
            b"SETTLED/1" => self.on_settled(header),
            b"DELIVER/1" => {
                if let [body] = body {
                    self.on_deliver(header, body);
                }
            }
            b"FENCED/1" if header.int(0) >= self.generation => return Err(Error::Fenced),
            b"REFUSED/1" => return self.on_refused(header),
            _ => {}
        }
        Ok(())
    }

    fn on_welcome(&mut self, header: Fields) {
        let (epoch, session, generation, heartbeat) = (header.bytes(0), header.int(1), header.int(2), header.int(3));
        if epoch.len() != 8 || generation < 1 || heartbeat < 1 {
            eprintln!("emp: a WELCOME that makes no sense");
            return;
        }
        if epoch == self.epoch && self.session.is_some_and(|known| session <= known) {
            return; // an old one that lay unread
        }
        self.epoch = epoch.to_vec();
        self.session = Some(session);
        self.generation = generation;
        self.heartbeat = Duration::from_millis(heartbeat).min(LIVENESS / 3);
        self.attached = true;
        self.taken_since = None;
        let limits = header.list(5);
        if limits.0.len() >= 3 {
            self.limits = Limits {
                message: limits.int(0) as usize,
                window: (limits.int(1) as usize).min(WINDOW),
                window_bytes: limits.int(2) as usize,
            };
        }
        for key in self.lanes.keys().cloned().collect::<Vec<_>>() {
            self.put_open(&key, 1); // everything unsettled, in order (rule 4)
        }
        if self.draining {
            self.put("DRAIN/1", vec![(DRAIN.as_millis() as u64).into()], None);
        }
        self.ping(Instant::now());
    }

    fn on_refused(&mut self, header: Fields) -> Result<(), Error> {
        let (code, why) = (header.text(0), header.text(1));
        eprintln!("emp: refused: {code}: {why}");
        if self.attached {
            return Ok(());
        }
        let since = *self.taken_since.get_or_insert_with(Instant::now);
        match code {
            // It may be our own predecessor.
            "name-taken" if since.elapsed() <= LIVENESS => Ok(()),
            "name-taken" | "denied" | "version" | "too-many" => Err(Error::Refused(format!("{code}: {why}"))),
            _ => Ok(()),
        }
    }

    fn on_settled(&mut self, header: Fields) {
        let (destination, cumulative) = (header.text(0).to_owned(), header.int(2));
        let key = (destination, header.int(1));
        let Some(lane) = self.lanes.get_mut(&key) else { return };
        if cumulative < lane.floor() || cumulative >= lane.next {
            return;
        }
        let mut refused: HashMap<u64, &str> = HashMap::new();
        for exception in header.list(3).0 {
            let exception = Fields::of(exception);
            refused.insert(exception.int(0), exception.text(1));
        }
        while lane.open.front().is_some_and(|batch| batch.number <= cumulative) {
            let Some(batch) = lane.open.pop_front() else { break };
            lane.bytes -= batch.body.len();
            if key.1 != REPLY_PRIORITY {
                self.settled.push(Settled {
                    destination: key.0.clone(),
                    number: batch.number,
                    refused: refused.get(&batch.number).map(|reason| (*reason).to_owned()),
                });
            }
        }
    }

    fn on_deliver(&mut self, header: Fields, body: &[u8]) {
        let (session, lane, sender) = (header.int(0), header.int(1), header.text(2).to_owned());
        let (incarnation, generation, priority) = (header.bytes(3).to_vec(), header.int(4), header.int(6));
        let (first, count, from, floor, flags) =
            (header.int(7), header.int(8), header.int(9), header.int(10), header.int(12));
        let last = first.saturating_add(count).saturating_sub(1);
        if first < 1 || !(1..=MAX_BATCH).contains(&count) || from < first || from > last || floor > from || floor < 1 {
            eprintln!("emp: a DELIVER that makes no sense: first {first} count {count} from {from} floor {floor}");
            return;
        }
        let key = (sender.clone(), incarnation.clone(), header.text(5).to_owned(), priority);
        let known = self.generations.get(&sender).copied().unwrap_or_default();
        let counts = flags & (REPLY | FROM_STORE) == 0;
        let is_fenced = counts && generation < known; // rule 20
        if !self.books.contains_key(&key) {
            if counts && generation > known {
                // Rules 18 and 19: of the older processes all that was delivered is acknowledged.
                self.books.retain(|(name, id, _, _), book| *name != sender || *id == incarnation || !book.is_idle());
                self.generations.insert(sender.clone(), generation);
            }
            self.forget_unused();
        }
        self.delivered += 1;
        let delivered = self.delivered;
        let book = self.books.entry(key.clone()).or_insert_with(|| {
            let high = if is_fenced { last } else { floor - 1 };
            let failed = if is_fenced {
                (from..=last).map(|number| (number, "fenced".into())).collect()
            } else {
                BTreeMap::new()
            };
            Book { base: floor, high, done: high, failed, session: None, lane: 0, session_high: 0, told: 0, used: 0 }
        });
        book.used = delivered;
        book.failed = book.failed.split_off(&floor); // what is below is settled
        if from > book.high + 1 {
            // Rule 15: everything below `from` is known now.
            for void in header.list(11).0 {
                let void = Fields::of(void);
                if void.int(0) > book.high && void.int(0) < from {
                    book.failed.insert(void.int(0), void.text(1).to_owned());
                }
            }
            if book.done == book.high {
                book.done = from - 1;
            }
            book.high = from - 1;
        }
        for number in from..(last + 1).min(book.base) {
            book.failed.insert(number, "overtaken".to_owned());
        }
        if Some(session) == self.session {
            if book.session != self.session || book.lane != lane {
                (book.session, book.lane, book.session_high, book.told) = (self.session, lane, 0, 0);
            }
            book.session_high = book.session_high.max(last);
            book.told = book.told.min(from - 1); // duplicates get the same answer again
        }
        let is_reply = flags & REPLY != 0;
        if !self.draining || is_reply {
            let messages = decode(body, count);
            for number in from.max(book.high + 1)..=last {
                book.high = number;
                let delivery = messages.as_ref().map(|messages| Delivery {
                    message: messages[(number - first) as usize].clone(),
                    sender: sender.clone(),
                    expects_reply: flags & EXPECTS_REPLY != 0,
                    redelivered: flags & REDELIVERED != 0,
                });
                let (book, incarnation) = (key.clone(), incarnation.clone());
                self.work.push_back(Work { book, number, delivery, incarnation, is_reply });
            }
        }
        self.acknowledge(&key);
    }

    /// Make room for one more book and one more name, those unused longest first. What is forgotten too early can lead
    /// to a repeat, never to a loss (rule 18).
    fn forget_unused(&mut self) {
        while self.books.len() >= MAX_BOOKS {
            let idle = self.books.iter().filter(|(_, book)| book.is_idle());
            let Some(key) = idle.min_by_key(|(_, book)| book.used).map(|(key, _)| key.clone()) else { break };
            self.books.remove(&key);
        }
        if self.generations.len() >= MAX_BOOKS {
            let present: HashSet<&String> = self.books.keys().map(|(sender, ..)| sender).collect();
            self.generations.retain(|sender, _| present.contains(sender));
        }
    }

    fn work_one(&mut self, handle: &mut dyn FnMut(&Delivery) -> Outcome) {
        let Some(work) = self.work.pop_front() else { return };
        // This client asks nobody: a reply is acknowledged and forgotten.
        let outcome = match &work.delivery {
            _ if work.is_reply => Ok(None),
            None => Err("invalid".to_owned()),
            Some(delivery) => handle(delivery),
        };
        if let (Ok(Some(content)), Some(asked)) = (&outcome, &work.delivery) {
            if asked.expects_reply {
                let reply = Message {
                    parent_id: asked.message.id.clone(),
                    operation: "response".to_owned(),
                    id: String::new(),
                    timestamp: 0,
                    resource_version: String::new(),
                    content: content.clone(),
                    ..asked.message.clone()
                };
                let requester = Some(work.incarnation);
                self.enqueue((asked.sender.clone(), REPLY_PRIORITY), REPLY, requester, encode(&reply));
                // rule 28
            }
        }
        if let Some(book) = self.books.get_mut(&work.book) {
            book.done = work.number;
            if let Err(reason) = outcome {
                book.failed.insert(work.number, reason);
            }
        }
        self.acknowledge(&work.book);
    }
}

// --- bodies and headers ----------------------------------------------------------------------------------

fn pack(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).expect("a vector takes everything");
    bytes
}

fn unpack(bytes: &[u8]) -> Option<Vec<Value>> {
    match rmpv::decode::read_value(&mut &bytes[..]) {
        Ok(Value::Array(fields)) => Some(fields),
        _ => None,
    }
}

fn encode(message: &Message) -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64);
    let id = if message.id.is_empty() { Uuid::new_v4().to_string() } else { message.id.clone() };
    let kind = if message.kind.is_empty() { "json" } else { &message.kind };
    pack(&Value::Array(vec![Value::Array(vec![
        id.into(),
        message.parent_id.as_str().into(),
        (if message.timestamp == 0 { now } else { message.timestamp }).into(),
        false.into(),
        message.resource_version.as_str().into(),
        message.source.as_str().into(),
        message.group.as_str().into(),
        message.resource.as_str().into(),
        message.operation.as_str().into(),
        kind.into(),
        Value::Binary(message.content.clone()),
    ])]))
}

/// None for a body that is no array of `count` messages. Fields may be missing at the end, or be new to us.
fn decode(body: &[u8], count: u64) -> Option<Vec<Message>> {
    let arrays = unpack(body).filter(|arrays| arrays.len() as u64 == count && arrays.iter().all(Value::is_array))?;
    let message = |value: &Value| {
        let fields = Fields::of(value);
        let text = |place| fields.text(place).to_owned();
        Message {
            id: text(0),
            parent_id: text(1),
            timestamp: fields.int(2) as i64,
            resource_version: text(4),
            source: text(5),
            group: text(6),
            resource: text(7),
            operation: text(8),
            kind: text(9),
            content: fields.bytes(10).to_vec(),
        }
    };
    Some(arrays.iter().map(message).collect())
}

/// Fields of an array, by position. What is missing or of another type is 0 or empty: trailing fields may be left out.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [Value]);

impl<'a> Fields<'a> {
    fn of(value: &'a Value) -> Self {
        Fields(value.as_array().map_or(&[], Vec::as_slice))
    }

    fn int(self, place: usize) -> u64 {
        self.0.get(place).and_then(Value::as_u64).unwrap_or(0)
    }

    fn text(self, place: usize) -> &'a str {
        self.0.get(place).and_then(Value::as_str).unwrap_or("")
    }

    fn bytes(self, place: usize) -> &'a [u8] {
        match self.0.get(place) {
            Some(Value::Binary(bytes)) => bytes,
            _ => &[],
        }
    }

    fn list(self, place: usize) -> Fields<'a> {
        self.0.get(place).map_or(Fields(&[]), Fields::of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> Client {
        Client::connect(&zmq::Context::new(), "receiver", "inproc://nobody").expect("a socket")
    }

    /// One message comes and is handled.
    fn arrive(client: &mut Client, sender: &str, incarnation: u64, generation: u64, number: u64) {
        deliver(client, sender, incarnation, generation, number);
        client.work_one(&mut |_| Ok(None));
    }

    fn deliver(client: &mut Client, sender: &str, incarnation: u64, generation: u64, number: u64) {
        let id = Value::Binary([incarnation.to_be_bytes(), [0; 8]].concat());
        let number = Value::from(number);
        #[rustfmt::skip]
        let fields = [
            1.into(), 1.into(), sender.into(), id, generation.into(), "receiver".into(), 3.into(), number.clone(),
            1.into(), number.clone(), number, Value::Array(vec![]), 0.into(),
        ];
        client.on_deliver(Fields(&fields), &pack(&Value::Array(vec![Value::Array(vec![])])));
    }

    #[test]
    fn books_of_a_senders_earlier_processes_are_forgotten() {
        let mut client = client();
        for generation in 1..=1000 {
            arrive(&mut client, "phoenix", generation, generation, 1);
        }
        assert_eq!(client.books.len(), 1);
    }

    #[test]
    fn a_book_with_something_in_hand_is_kept() {
        let mut client = client();
        deliver(&mut client, "phoenix", 1, 1, 1);
        deliver(&mut client, "phoenix", 2, 2, 1);
        assert_eq!(client.books.len(), 2);
    }

    #[test]
    fn books_and_names_are_bounded_and_those_in_use_stay() {
        let mut client = client();
        for number in 0..(MAX_BOOKS as u64 + 100) {
            arrive(&mut client, &format!("s{number}"), number, 1, 1);
            arrive(&mut client, "s0", 0, 1, number + 2);
        }
        assert!(client.books.len() <= MAX_BOOKS && client.generations.len() <= MAX_BOOKS);
        assert!(client.books.keys().any(|(sender, ..)| sender == "s0"));
    }

    #[test]
    fn another_senders_incarnation_is_not_its_own() {
        let mut client = client();
        arrive(&mut client, "pump", 1, 1, 1);
        arrive(&mut client, "thief", 1, 1, 1);
        assert_eq!(client.books.len(), 2);
    }
}
