package edgezmq.example;

import java.io.Closeable;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.lang.System.Logger;
import java.lang.System.Logger.Level;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.SecureRandom;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Deque;
import java.util.HashMap;
import java.util.HashSet;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Set;
import java.util.TreeMap;
import java.util.UUID;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import org.msgpack.core.MessageBufferPacker;
import org.msgpack.core.MessagePack;
import org.msgpack.core.MessagePackException;
import org.msgpack.core.MessageUnpacker;
import org.msgpack.value.ImmutableValue;
import org.msgpack.value.Value;
import org.msgpack.value.ValueFactory;
import org.zeromq.SocketType;
import org.zeromq.ZContext;
import org.zeromq.ZMQ;

/**
 * A client of EMP/1, the Edge Module Protocol of edgezmq (docs/emp.md). Copy this file into a module of your own; it
 * needs the libraries jeromq and msgpack-core.
 *
 * <p>The thread that calls {@link #run} owns the socket. Messages are handled in threads of a pool: those of one lane
 * one after another, in their order, requests side by side. {@link #send} may be called by any thread. Nothing has to
 * be stored: what was sent is kept until the broker says that it is settled, and sent again after every reconnect.
 */
public final class Emp implements Closeable {
    /** The class of a lane; lower ones are delivered first. */
    public enum Priority {
        SIGNAL(2),
        DATA(3);

        private final int number;

        Priority(int number) {
            this.number = number;
        }
    }

    /**
     * KubeEdge's message as it stands on the bus.
     *
     * @param timestamp milliseconds since 1970
     * @param source claimed; {@link Delivery#sender} is vouched for
     * @param kind what content is: json, text or bytes
     */
    public record Message(
            String id,
            String parentId,
            long timestamp,
            boolean sync,
            String resourceVersion,
            String source,
            String group,
            String resource,
            String operation,
            String kind,
            byte[] content) {
        /** A new message with JSON in it. */
        public static Message json(String source, String group, String resource, String operation, String content) {
            byte[] bytes = content.getBytes(StandardCharsets.UTF_8);
            long now = System.currentTimeMillis();
            return new Message(newId(), "", now, false, "", source, group, resource, operation, "json", bytes);
        }

        /** The reply to this request, with content of the same kind. */
        public Message response(byte[] content) {
            long now = System.currentTimeMillis();
            return new Message(newId(), id, now, false, "", source, group, resource, "response", kind, content);
        }

        private static String newId() {
            return UUID.randomUUID().toString();
        }
    }

    /**
     * A message for us, and what the broker says of it.
     *
     * @param redelivered it may have been handled before
     */
    public record Delivery(Message message, String sender, boolean expectsReply, boolean redelivered) {}

    /** Handles one message. */
    @FunctionalInterface
    public interface Handler {
        /**
         * Returns the reply's content for a request; null for no reply. {@link Refused} goes to the sender at once; any
         * other exception is tried again twice, then the sender is told {@code failed}.
         */
        byte[] handle(Delivery delivery) throws Exception;
    }

    /** A message that was not handled, or, thrown by a handler, will not be. */
    public static final class Refused extends Exception {
        private static final long serialVersionUID = 1L;
        private final String reason;

        public Refused(String reason) {
            super("refused: " + reason);
            this.reason = reason;
        }

        public String reason() {
            return reason;
        }
    }

    /** The broker does not let us go on: it does not take us, or a newer process has our name. */
    public static final class TurnedAway extends Exception {
        private static final long serialVersionUID = 1L;
        private final boolean fenced;

        private TurnedAway(String why, boolean fenced) {
            super(why);
            this.fenced = fenced;
        }

        /** A newer process has our name. */
        public boolean isFenced() {
            return fenced;
        }
    }

    private static final Logger LOG = System.getLogger("emp");
    private static final SecureRandom RANDOM = new SecureRandom();

    private static final long LIVENESS_MS = 15_000;
    private static final long HELLO_MS = 500;
    private static final long DRAIN_MS = 8_000;
    private static final long[] RETRY_MS = {100, 500};
    /** Unsettled messages of a lane; the broker's own limit is taken when it is lower. */
    private static final int WINDOW = 1024;
    /** Told in one PING. */
    private static final int MAX_FLOORS = 1024;
    /** Refusals told in one ACK (section 4). */
    private static final int MAX_REFUSALS = 1000;

    private static final int REPLY_PRIORITY = 0;
    private static final int EXPECTS_REPLY = 1;
    private static final int REPLY = 2;
    private static final int RESENT = 4;
    private static final int REDELIVERED = 16;
    private static final int FROM_STORE = 32;

    /** Of lanes towards us, and as many senders. */
    private static final int MAX_BOOKS = 4096;

    private record LaneKey(String destination, int priority) {}

    /** By sender too: that the broker vouches for, and an incarnation others can say as well. */
    private record BookKey(String sender, ByteBuffer incarnation, String destination, int priority) {}

    /** One message of ours under way: this client sends them one by one. */
    private static final class Batch {
        final long number;
        final byte[] requester;
        final byte[] body;
        final CompletableFuture<Void> receipt = new CompletableFuture<>();
        int flags;

        Batch(long number, int flags, byte[] requester, byte[] body) {
            this.number = number;
            this.flags = flags;
            this.requester = requester;
            this.body = body;
        }
    }

    /** A way to a destination: what is not settled yet, in order. */
    private static final class Lane {
        long next = 1;
        long bytes;
        final Deque<Batch> open = new ArrayDeque<>();

        long floor() {
            return open.isEmpty() ? next : open.peekFirst().number;
        }
    }

    /** One message for us that has no outcome yet; delivery is null where the body did not hold it. */
    private record Item(long number, Delivery delivery, byte[] incarnation) {}

    /** What is known of a lane towards us: all up to {@code high}, outcomes of all up to {@code done}. */
    private static final class Book {
        final long base;
        long high;
        long done;
        final Set<Long> finished = new HashSet<>(); // above done, out of order
        final TreeMap<Long, String> failed = new TreeMap<>();
        final Deque<Item> queue = new ArrayDeque<>();
        boolean isBusy;
        long session = -1;
        long lane;
        long sessionHigh;
        long told;

        /** All that came has its outcome. */
        boolean isIdle() {
            return done == high && queue.isEmpty();
        }

        Book(long floor) {
            base = floor;
            high = done = floor - 1;
        }

        void finish(long number, String reason) {
            if (reason != null) {
                failed.put(number, reason);
            }
            finished.add(number);
            advance();
        }

        void advance() {
            while (finished.remove(done + 1)) {
                done++;
            }
        }
    }

    private record Limits(long message, int window, long windowBytes) {}

    private final String name;
    private final String endpoint;
    private final Handler handler;
    private final byte[] incarnation = new byte[16];
    private final ZContext context = new ZContext();
    private final ExecutorService workers = Executors.newCachedThreadPool(Emp::daemon);
    private final AtomicBoolean isRung = new AtomicBoolean();
    private volatile boolean isStopping;

    // All below is guarded by this object.
    private final Map<LaneKey, Lane> lanes = new HashMap<>();
    private final Map<BookKey, Book> books = new LinkedHashMap<>(16, 0.75f, true); // unused longest first
    private final Map<String, Long> generations = new HashMap<>();
    private final Deque<List<byte[]>> out = new ArrayDeque<>();
    private ZMQ.Socket bell; // wakes the thread that owns the socket
    private byte[] epoch = {};
    private long session = -1;
    private long generation;
    private long heartbeatMs = 1_000;
    private Limits limits = new Limits(1 << 20, 64, 1 << 20);
    private boolean isAttached;
    private boolean isDraining;
    private boolean isClosed;
    private TurnedAway end;
    private int inHand; // messages that a handler has
    private long nonce;
    private long pinged = -1; // when the PING went that has no PONG; -1: none
    private long pingDue;
    private long helloDue = now();
    private long takenSince = -1;
    private long fresh = -1; // when the last answered PING was sent; -1: never

    /** {@link #run} connects it; {@link #send} may be called before. */
    public Emp(String name, String endpoint, Handler handler) {
        this.name = Objects.requireNonNull(name);
        this.endpoint = Objects.requireNonNull(endpoint);
        this.handler = Objects.requireNonNull(handler);
        RANDOM.nextBytes(incarnation);
    }

    /** Where the bus is, by the environment. There is no default: jeromq knows no Unix sockets. */
    public static String endpoint() {
        String bus = System.getenv("EDGEZMQ_BUS");
        if (bus == null || !bus.startsWith("tcp://")) {
            throw new IllegalStateException("EDGEZMQ_BUS is " + bus + "; expected tcp://HOST:PORT (jeromq has no ipc)");
        }
        return bus;
    }

    private static Thread daemon(Runnable work) {
        Thread thread = new Thread(work, "emp-worker");
        thread.setDaemon(true);
        return thread;
    }

    private static long now() {
        return System.nanoTime() / 1_000_000;
    }

    // --- the owner of the socket --------------------------------------------------------------------

    /**
     * Attach and serve until {@link #stop}; then drain, and return. Once only.
     *
     * @throws TurnedAway the broker does not let us go on
     */
    public void run() throws TurnedAway {
        try (ZMQ.Socket dealer = context.createSocket(SocketType.DEALER);
                ZMQ.Socket bellEnd = context.createSocket(SocketType.PAIR)) {
            String bellName = "inproc://emp-" + UUID.randomUUID();
            bellEnd.bind(bellName);
            configure(dealer);
            dealer.connect(endpoint);
            synchronized (this) {
                bell = context.createSocket(SocketType.PAIR);
                bell.connect(bellName);
            }
            serve(dealer, bellEnd);
        } finally {
            synchronized (this) {
                isClosed = true;
                bell = null;
                notifyAll();
            }
            workers.shutdownNow();
        }
    }

    /** Ask {@link #run} to drain and return. From any thread. */
    public void stop() {
        isStopping = true;
        synchronized (this) {
            notifyAll();
            ring();
        }
    }

    /** Let go what is left; {@link #run} must have returned. */
    @Override
    public void close() {
        context.close();
    }

    private static void configure(ZMQ.Socket dealer) {
        dealer.setImmediate(false); // jeromq's own sense: false is ZMQ_IMMEDIATE 1
        dealer.setLinger(1_000);
        dealer.setSndHWM(0);
        dealer.setRcvHWM(0);
        dealer.setReconnectIVL(20);
        dealer.setReconnectIVLMax(500);
        String key = System.getenv("EDGEZMQ_CURVE_KEY");
        String server = System.getenv("EDGEZMQ_CURVE_SERVER");
        if (server != null && !server.isEmpty()) {
            if (key == null || key.isEmpty()) {
                throw new IllegalStateException("EDGEZMQ_CURVE_SERVER is set, EDGEZMQ_CURVE_KEY is not");
            }
            String certificate = read(Path.of(key));
            dealer.setCurveServerKey(ZMQ.Curve.z85Decode(server));
            dealer.setCurvePublicKey(ZMQ.Curve.z85Decode(field(certificate, "public-key", key)));
            dealer.setCurveSecretKey(ZMQ.Curve.z85Decode(field(certificate, "secret-key", key)));
        }
    }

    private static String read(Path file) {
        try {
            return Files.readString(file);
        } catch (IOException fault) {
            throw new UncheckedIOException("EDGEZMQ_CURVE_KEY", fault);
        }
    }

    /** A line {@code name = "Z85"} of a certificate in the format of pyzmq and CZMQ. */
    private static String field(String certificate, String field, String file) {
        Matcher line = Pattern.compile("(?m)^\\s*" + field + "\\s*=\\s*\"(.{40})\"").matcher(certificate);
        if (!line.find()) {
            throw new IllegalStateException(file + ": no " + field + " in it");
        }
        return line.group(1);
    }

    private void serve(ZMQ.Socket dealer, ZMQ.Socket bellEnd) throws TurnedAway {
        try (ZMQ.Poller poller = context.createPoller(2)) {
            poller.register(dealer, ZMQ.Poller.POLLIN);
            poller.register(bellEnd, ZMQ.Poller.POLLIN);
            long drainUntil = 0;
            while (true) {
                long wait;
                synchronized (this) {
                    long now = now();
                    if (isStopping && !isDraining) {
                        drainUntil = now + DRAIN_MS;
                        isDraining = true;
                        if (isAttached) {
                            put("DRAIN/1", DRAIN_MS);
                        }
                    }
                    boolean isDone = isDraining && (isIdle() || now >= drainUntil);
                    if (isDone && isAttached) {
                        put("BYE/1", false);
                    }
                    keepAttached(now);
                    flush(dealer);
                    if (end != null) {
                        throw end;
                    }
                    if (isDone) {
                        return;
                    }
                    wait = Math.max(due() - now, 0) + 1;
                }
                poller.poll(wait);
                isRung.set(false);
                while (bellEnd.recv(ZMQ.DONTWAIT) != null) {
                    // Somebody has put something out.
                }
                // All that is there: before anything is handled (rule 21), and before a PONG is missed.
                for (byte[] first = dealer.recv(ZMQ.DONTWAIT); first != null; first = dealer.recv(ZMQ.DONTWAIT)) {
                    List<byte[]> frames = new ArrayList<>(List.of(first));
                    while (dealer.hasReceiveMore()) {
                        frames.add(dealer.recv());
                    }
                    synchronized (this) {
                        read(frames);
                    }
                }
            }
        }
    }

    // --- sending; any thread ------------------------------------------------------------------------

    /**
     * Give the message to its lane. Waits for room while the lane's window is full.
     *
     * @return a receipt: done once the message was handled, failed with {@link Refused} when it was not, cancelled when
     *     this client ended before that was known
     */
    public CompletableFuture<Void> send(String destination, Priority priority, Message message)
            throws InterruptedException {
        return enqueue(new LaneKey(destination, priority.number), 0, null, encode(message));
    }

    private synchronized CompletableFuture<Void> enqueue(LaneKey key, int flags, byte[] requester, byte[] body)
            throws InterruptedException {
        Lane lane = lanes.computeIfAbsent(key, unused -> new Lane());
        while (key.priority != REPLY_PRIORITY && !lane.open.isEmpty() && !isStopping && !isClosed
                && (lane.open.size() >= limits.window || lane.bytes + body.length > limits.windowBytes)) {
            wait();
        }
        if (isClosed || isStopping && key.priority != REPLY_PRIORITY) {
            return cancelled();
        }
        if (body.length > limits.message) {
            throw new IllegalArgumentException(body.length + " bytes; the broker allows " + limits.message);
        }
        Batch batch = new Batch(lane.next++, flags, requester, body);
        lane.open.add(batch);
        lane.bytes += body.length;
        if (isAttached) {
            putBatch(key, lane, batch);
            ring();
        }
        return batch.receipt;
    }

    private static CompletableFuture<Void> cancelled() {
        CompletableFuture<Void> receipt = new CompletableFuture<>();
        receipt.cancel(false);
        return receipt;
    }

    // --- out; the lock is held ----------------------------------------------------------------------

    private void ring() {
        if (bell != null && isRung.compareAndSet(false, true)) {
            bell.send(new byte[0], ZMQ.DONTWAIT);
        }
    }

    private void put(String verb, Object... fields) {
        out.add(new ArrayList<>(List.of(verb.getBytes(StandardCharsets.US_ASCII), pack(List.of(fields)))));
    }

    private void putBatch(LaneKey key, Lane lane, Batch batch) {
        List<Object> header = new ArrayList<>(List.of(key.destination, key.priority, batch.number, 1, lane.floor()));
        header.add(batch.flags);
        header.add(null); // ttl
        header.add(batch.requester);
        out.add(List.of("SEND/1".getBytes(StandardCharsets.US_ASCII), pack(header), batch.body));
        batch.flags |= RESENT; // if it goes once more
    }

    private void flush(ZMQ.Socket dealer) {
        for (List<byte[]> frames : out) {
            int last = frames.size() - 1;
            for (int place = 0; place <= last; place++) {
                if (!dealer.send(frames.get(place), ZMQ.DONTWAIT | (place < last ? ZMQ.SNDMORE : 0))) {
                    isAttached = false; // no connection: WELCOME will bring it again
                    out.clear();
                    return;
                }
            }
        }
        out.clear();
    }

    private void keepAttached(long now) {
        if (isAttached && pinged >= 0 && now - pinged > LIVENESS_MS) {
            isAttached = false; // no PONG
        }
        if (!isAttached && end == null && now >= helloDue) { // not once FENCED or REFUSED has ended us
            helloDue = now + HELLO_MS;
            put("HELLO/1", name, List.of(), incarnation, generation, LIVENESS_MS, "java-example", 2048, 8 << 20,
                    ProcessHandle.current().pid());
        } else if (isAttached && pinged < 0 && now >= pingDue) {
            ping(now);
        }
    }

    private void ping(long now) {
        nonce++;
        pinged = now;
        pingDue = now + heartbeatMs;
        List<Object> floors = new ArrayList<>();
        lanes.forEach((key, lane) -> {
            if (lane.open.isEmpty() && floors.size() < MAX_FLOORS) {
                floors.add(List.of(key.destination, key.priority, lane.next));
            }
        });
        put("PING/1", nonce, Map.of(), floors);
    }

    private long due() {
        long due = !isAttached ? helloDue : pinged < 0 ? pingDue : pinged + LIVENESS_MS;
        return isDraining ? Math.min(due, now() + 50) : due;
    }

    private void acknowledge(Book book) {
        long done = Math.min(book.done, book.sessionHigh);
        if (!isAttached || book.session != session) {
            return;
        }
        while (book.told < done) {
            List<Object> refused = new ArrayList<>();
            long upTo = done;
            for (Map.Entry<Long, String> each : book.failed.subMap(book.told, false, done, true).entrySet()) {
                if (refused.size() == MAX_REFUSALS) {
                    upTo = each.getKey() - 1;
                    break;
                }
                refused.add(List.of(each.getKey(), each.getValue()));
            }
            book.told = upTo;
            put("ACK/1", session, List.of(List.of(book.lane, upTo, refused)));
        }
    }

    /** Nothing of ours is unsettled and nothing of others is in hand. */
    private boolean isIdle() {
        return inHand == 0 && lanes.values().stream().allMatch(lane -> lane.open.isEmpty());
    }

    // --- in; the lock is held -----------------------------------------------------------------------

    private void read(List<byte[]> frames) {
        String verb = new String(frames.get(0), StandardCharsets.US_ASCII);
        Fields header = frames.size() < 2 ? null : Fields.of(frames.get(1));
        if (header == null) {
            LOG.log(Level.WARNING, "{0} with a header that cannot be read", verb);
            return;
        }
        switch (verb) {
            case "WELCOME/1" -> onWelcome(header);
            case "WHO/1" -> {
                if (isAttached) {
                    isAttached = false;
                    helloDue = now();
                }
            }
            case "PONG/1" -> {
                if (pinged >= 0 && header.integer(0) == nonce) {
                    fresh = pinged;
                    pinged = -1;
                    notifyAll();
                }
            }
            case "SETTLED/1" -> onSettled(header);
            case "DELIVER/1" -> {
                if (frames.size() == 3) {
                    onDeliver(header, frames.get(2));
                }
            }
            case "FENCED/1" -> {
                if (header.integer(0) >= generation) {
                    isAttached = false;
                    end = new TurnedAway("a newer process has our name", true);
                }
            }
            case "REFUSED/1" -> onRefused(header.text(0), header.text(1));
            default -> LOG.log(Level.DEBUG, "{0} is unknown", verb);
        }
    }

    private void onWelcome(Fields header) {
        byte[] itsEpoch = header.bytes(0);
        long itsSession = header.integer(1);
        if (itsEpoch.length != 8 || header.integer(2) < 1 || header.integer(3) < 1) {
            LOG.log(Level.WARNING, "a WELCOME that makes no sense");
            return;
        }
        if (Arrays.equals(itsEpoch, epoch) && itsSession <= session) {
            return; // an old one that lay unread
        }
        epoch = itsEpoch;
        session = itsSession;
        generation = header.integer(2);
        heartbeatMs = Math.min(header.integer(3), LIVENESS_MS / 3);
        isAttached = true;
        takenSince = -1;
        Fields allowed = header.list(5);
        if (allowed.size() >= 3) {
            limits = new Limits(allowed.integer(0), (int) Math.min(allowed.integer(1), WINDOW), allowed.integer(2));
        }
        lanes.forEach((key, lane) -> lane.open.forEach(batch -> putBatch(key, lane, batch))); // in order (rule 4)
        if (isDraining) {
            put("DRAIN/1", DRAIN_MS);
        }
        ping(now());
        notifyAll();
    }

    private void onRefused(String code, String why) {
        LOG.log(Level.WARNING, "refused: {0}: {1}", code, why);
        if (isAttached) {
            return;
        }
        switch (code) {
            case "name-taken" -> {
                takenSince = takenSince < 0 ? now() : takenSince;
                if (now() - takenSince > LIVENESS_MS) { // until then it may be our own predecessor
                    end = new TurnedAway(code + ": " + why, false);
                }
            }
            case "denied", "version", "too-many" -> end = new TurnedAway(code + ": " + why, false);
            default -> { }
        }
    }

    private void onSettled(Fields header) {
        Lane lane = lanes.get(new LaneKey(header.text(0), (int) header.integer(1)));
        long cumulative = header.integer(2);
        if (lane == null || cumulative < lane.floor() || cumulative >= lane.next) {
            return;
        }
        Map<Long, String> refused = new HashMap<>();
        for (Fields exception : header.list(3).lists()) {
            refused.put(exception.integer(0), exception.text(1));
        }
        while (!lane.open.isEmpty() && lane.open.peekFirst().number <= cumulative) {
            Batch batch = lane.open.removeFirst();
            lane.bytes -= batch.body.length;
            String reason = refused.get(batch.number);
            // In the pool: what hangs on a receipt must not hold up the socket.
            workers.execute(() -> {
                if (reason == null) {
                    batch.receipt.complete(null);
                } else {
                    batch.receipt.completeExceptionally(new Refused(reason));
                }
            });
        }
        notifyAll();
    }

    private void onDeliver(Fields header, byte[] body) {
        long first = header.integer(7);
        long count = header.integer(8);
        long from = header.integer(9);
        long floor = header.integer(10);
        long last = first + count - 1;
        if (first < 1 || count < 1 || count > 1024 || from < first || from > last || floor < 1 || floor > from) {
            String numbers = "first " + first + " count " + count + " from " + from + " floor " + floor;
            LOG.log(Level.WARNING, "a DELIVER that makes no sense: " + numbers);
            return;
        }
        String sender = header.text(2);
        byte[] incarnation = header.bytes(3);
        int flags = (int) header.integer(12);
        Book book = book(header, sender, incarnation, flags, from, last, floor);
        book.failed.headMap(floor).clear(); // what is below is settled
        if (from > book.high + 1) { // rule 15: everything below `from` is known now
            for (Fields gone : header.list(11).lists()) {
                if (gone.integer(0) > book.high && gone.integer(0) < from) {
                    book.failed.put(gone.integer(0), gone.text(1));
                }
            }
            if (book.done == book.high) {
                book.done = from - 1;
            } else {
                for (long number = book.high + 1; number < from; number++) {
                    book.finished.add(number);
                }
            }
            book.high = from - 1;
            book.advance();
        }
        for (long number = from; number <= Math.min(last, book.base - 1); number++) {
            book.failed.put(number, "overtaken");
        }
        if (header.integer(0) == session) {
            if (book.session != session || book.lane != header.integer(1)) {
                book.session = session;
                book.lane = header.integer(1);
                book.sessionHigh = book.told = 0;
            }
            book.sessionHigh = Math.max(book.sessionHigh, last);
            book.told = Math.min(book.told, from - 1); // duplicates get the same answer again
        }
        List<Message> messages = decode(body, count);
        for (long number = Math.max(from, book.high + 1); number <= last; number++) {
            boolean isReply = (flags & REPLY) != 0;
            if (isDraining && !isReply) {
                break; // not begun: it goes to the next process
            }
            book.high = number;
            if (isReply) {
                book.finish(number, null); // this client asks nobody: taken and forgotten
                continue;
            }
            Delivery delivery = null;
            if (messages != null) {
                Message message = messages.get((int) (number - first));
                boolean expectsReply = (flags & EXPECTS_REPLY) != 0;
                delivery = new Delivery(message, sender, expectsReply, (flags & REDELIVERED) != 0);
            }
            work(book, new Item(number, delivery, incarnation));
        }
        acknowledge(book);
    }

    /** The book of a DELIVER; one that is fenced (rule 20) gets a book that nobody keeps. */
    private Book book(Fields header, String sender, byte[] incarnation, int flags, long from, long last, long floor) {
        BookKey key = new BookKey(sender, ByteBuffer.wrap(incarnation), header.text(5), (int) header.integer(6));
        Book book = books.get(key);
        if (book == null) {
            book = new Book(floor);
            long known = generations.getOrDefault(sender, 0L);
            long itsGeneration = header.integer(4);
            boolean counts = (flags & (REPLY | FROM_STORE)) == 0;
            if (counts && itsGeneration < known) {
                book.high = book.done = last;
                for (long number = from; number <= last; number++) {
                    book.failed.put(number, "fenced");
                }
            } else {
                if (counts && itsGeneration > known) {
                    // Rules 18 and 19: of the older processes all that was delivered is acknowledged.
                    books.entrySet().removeIf(each -> each.getKey().sender.equals(sender)
                            && !each.getKey().incarnation.equals(key.incarnation) && each.getValue().isIdle());
                    generations.put(sender, itsGeneration);
                }
                forgetUnused();
                books.put(key, book);
            }
        }
        return book;
    }

    /** Room for one more book and one more name. What is forgotten too early can lead to a repeat, never to a loss. */
    private void forgetUnused() {
        Iterator<Book> longestUnused = books.values().iterator();
        while (books.size() >= MAX_BOOKS && longestUnused.hasNext()) {
            if (longestUnused.next().isIdle()) {
                longestUnused.remove();
            }
        }
        if (generations.size() >= MAX_BOOKS) {
            Set<String> present = new HashSet<>();
            books.keySet().forEach(key -> present.add(key.sender));
            generations.keySet().retainAll(present);
        }
    }

    // --- handling -----------------------------------------------------------------------------------

    private void work(Book book, Item item) {
        if (item.delivery != null && item.delivery.expectsReply) {
            workers.execute(() -> handle(book, item));
            return;
        }
        book.queue.add(item);
        if (!book.isBusy) {
            book.isBusy = true;
            workers.execute(() -> handleQueue(book));
        }
    }

    private void handleQueue(Book book) {
        while (true) {
            Item next;
            synchronized (this) {
                next = book.queue.poll();
                if (next == null) {
                    book.isBusy = false;
                    return;
                }
            }
            handle(book, next);
        }
    }

    private void handle(Book book, Item item) {
        try {
            synchronized (this) {
                while (!isStopping && !isClosed && (fresh < 0 || now() - fresh > LIVENESS_MS)) {
                    wait(); // rule 21
                }
                if (isStopping || isClosed) {
                    return; // not begun: the next process gets it
                }
                inHand++;
            }
            String reason = item.delivery == null ? "invalid" : call(item);
            synchronized (this) {
                inHand--;
                book.finish(item.number, reason);
                acknowledge(book);
                ring();
            }
        } catch (InterruptedException ended) {
            Thread.currentThread().interrupt();
        }
    }

    /** Runs the handler, again if it fails; gives the reply to its lane before anything is acknowledged (rule 28). */
    private String call(Item item) throws InterruptedException {
        Delivery delivery = item.delivery;
        for (int attempt = 0; ; attempt++) {
            try {
                byte[] content = handler.handle(delivery);
                if (delivery.expectsReply && content != null) {
                    byte[] body = encode(delivery.message.response(content));
                    enqueue(new LaneKey(delivery.sender, REPLY_PRIORITY), REPLY, item.incarnation, body);
                }
                return null;
            } catch (InterruptedException ended) {
                throw ended;
            } catch (Refused refused) {
                return refused.reason;
            } catch (Exception fault) {
                if (attempt == RETRY_MS.length) {
                    LOG.log(Level.ERROR, "handling " + delivery.message.resource + " of " + delivery.sender, fault);
                    return "failed";
                }
                Thread.sleep(RETRY_MS[attempt]);
            }
        }
    }

    // --- bodies and headers -------------------------------------------------------------------------

    private static byte[] encode(Message message) {
        return pack(List.of(List.of(
                message.id,
                message.parentId,
                message.timestamp,
                message.sync,
                message.resourceVersion,
                message.source,
                message.group,
                message.resource,
                message.operation,
                message.kind,
                message.content)));
    }

    /** Null for what is no array of {@code count} messages. Fields may be missing at the end, or be new to us. */
    private static List<Message> decode(byte[] body, long count) {
        Fields arrays = Fields.of(body);
        if (arrays == null || arrays.size() != count || arrays.lists().size() != count) {
            return null;
        }
        List<Message> messages = new ArrayList<>();
        for (Fields fields : arrays.lists()) {
            messages.add(new Message(
                    fields.text(0),
                    fields.text(1),
                    fields.integer(2),
                    fields.flag(3),
                    fields.text(4),
                    fields.text(5),
                    fields.text(6),
                    fields.text(7),
                    fields.text(8),
                    fields.text(9),
                    fields.bytes(10)));
        }
        return messages;
    }

    private static byte[] pack(List<?> fields) {
        try (MessageBufferPacker packer = MessagePack.newDefaultBufferPacker()) {
            pack(packer, fields);
            return packer.toByteArray();
        } catch (IOException fault) {
            throw new UncheckedIOException(fault);
        }
    }

    private static void pack(MessageBufferPacker packer, Object field) throws IOException {
        if (field == null) {
            packer.packNil();
        } else if (field instanceof String text) {
            packer.packString(text);
        } else if (field instanceof Number number) {
            packer.packLong(number.longValue());
        } else if (field instanceof Boolean flag) {
            packer.packBoolean(flag);
        } else if (field instanceof byte[] bytes) {
            packer.packBinaryHeader(bytes.length).writePayload(bytes);
        } else if (field instanceof Map<?, ?> map && map.isEmpty()) {
            packer.packMapHeader(0);
        } else if (field instanceof List<?> list) {
            packer.packArrayHeader(list.size());
            for (Object each : list) {
                pack(packer, each);
            }
        } else {
            throw new IllegalArgumentException(field.getClass() + " has no place in a header");
        }
    }

    /** An array, read by position. What is missing (fields may be left out) or of another type is 0 or empty. */
    private record Fields(List<Value> values) {
        static Fields of(byte[] bytes) {
            try (MessageUnpacker unpacker = MessagePack.newDefaultUnpacker(bytes)) {
                ImmutableValue value = unpacker.unpackValue();
                return value.isArrayValue() && !unpacker.hasNext() ? new Fields(value.asArrayValue().list()) : null;
            } catch (MessagePackException | IOException | IllegalArgumentException fault) {
                return null;
            }
        }

        int size() {
            return values.size();
        }

        private Value at(int place) {
            return place < values.size() ? values.get(place) : ValueFactory.newNil();
        }

        long integer(int place) {
            Value value = at(place);
            boolean fits = value.isIntegerValue() && value.asIntegerValue().isInLongRange();
            return fits ? value.asIntegerValue().toLong() : 0;
        }

        String text(int place) {
            Value value = at(place);
            return value.isStringValue() ? value.asStringValue().asString() : "";
        }

        byte[] bytes(int place) {
            Value value = at(place);
            return value.isBinaryValue() ? value.asBinaryValue().asByteArray() : new byte[0];
        }

        boolean flag(int place) {
            Value value = at(place);
            return value.isBooleanValue() && value.asBooleanValue().getBoolean();
        }

        Fields list(int place) {
            Value value = at(place);
            return new Fields(value.isArrayValue() ? value.asArrayValue().list() : List.of());
        }

        /** Those of its fields that are arrays. */
        List<Fields> lists() {
            return values.stream()
                    .filter(Value::isArrayValue)
                    .map(value -> new Fields(value.asArrayValue().list()))
                    .toList();
        }
    }
}
