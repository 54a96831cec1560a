package edgezmq.example;

import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletionException;

/**
 * A module of an edgezmq node, in Java: it answers requests with what it was asked, and uploads a reading now and then.
 *
 * <pre>edgezmq send java-example -r anything --content '{"x": 1}' --request</pre>
 */
public final class Main {
    private static final String NAME = "java-example";

    private Main() {}

    public static void main(String[] arguments) throws InterruptedException {
        int status = 0;
        try (Emp emp = new Emp(NAME, Emp.endpoint(), delivery -> delivery.message().content())) {
            Thread main = Thread.currentThread();
            Runtime.getRuntime().addShutdownHook(new Thread(() -> {
                // SIGTERM, SIGINT: the machine goes on to its end when this returns.
                emp.stop();
                try {
                    main.join();
                } catch (InterruptedException impatient) {
                    Thread.currentThread().interrupt();
                }
            }));
            Thread uploader = new Thread(() -> upload(emp), "uploader");
            uploader.setDaemon(true);
            uploader.start();
            emp.run();
        } catch (Emp.TurnedAway away) {
            System.err.println(NAME + ": " + away.getMessage());
            status = away.isFenced() ? 3 : 1;
        } catch (IllegalStateException fault) {
            System.err.println(NAME + ": " + fault.getMessage());
            status = 2;
        }
        if (status != 0) {
            Runtime.getRuntime().halt(status); // there is nothing to drain any more
        }
    }

    /** Readings wait for room when the broker or the cloud is away for long: none is left out. */
    private static void upload(Emp emp) {
        try {
            for (long number = 1; ; number++) {
                String content = "{\"number\": " + number + "}";
                Emp.Message reading = Emp.Message.json(NAME, "user", "default/java-example/reading", "upload", content);
                long sent = number;
                emp.send("@hub", Emp.Priority.DATA, reading).whenComplete((done, fault) -> {
                    if (fault != null && !(fault instanceof CancellationException)) {
                        Throwable why = fault instanceof CompletionException ? fault.getCause() : fault;
                        System.err.println("reading " + sent + ": " + why.getMessage());
                    }
                });
                Thread.sleep(interval());
            }
        } catch (InterruptedException ended) {
            Thread.currentThread().interrupt();
        }
    }

    /** UPLOAD_SECONDS in milliseconds, default 10 s; less under test. */
    private static long interval() {
        String set = System.getenv("UPLOAD_SECONDS");
        double standard = System.getenv("EDGEZMQ_CONFORM") != null ? 0.2 : 10;
        double seconds = standard;
        if (set != null && !set.isEmpty()) {
            seconds = Double.parseDouble(set);
        }
        return Math.round((seconds > 0 ? seconds : standard) * 1000);
    }
}
