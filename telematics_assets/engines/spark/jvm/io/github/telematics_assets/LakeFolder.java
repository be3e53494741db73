package io.github.telematics_assets;

import java.io.FileNotFoundException;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.TreeSet;
import java.util.UUID;
import java.util.function.Supplier;
import java.util.regex.Pattern;

import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FileStatus;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Path;
import org.apache.spark.sql.SparkSession;
import org.apache.spark.sql.catalyst.analysis.NamespaceAlreadyExistsException;
import org.apache.spark.sql.catalyst.analysis.NoSuchFunctionException;
import org.apache.spark.sql.catalyst.analysis.NoSuchNamespaceException;
import org.apache.spark.sql.catalyst.analysis.NoSuchTableException;
import org.apache.spark.sql.connector.catalog.FunctionCatalog;
import org.apache.spark.sql.connector.catalog.Identifier;
import org.apache.spark.sql.connector.catalog.NamespaceChange;
import org.apache.spark.sql.connector.catalog.SupportsNamespaces;
import org.apache.spark.sql.connector.catalog.Table;
import org.apache.spark.sql.connector.catalog.TableCatalog;
import org.apache.spark.sql.connector.catalog.TableChange;
import org.apache.spark.sql.connector.catalog.functions.UnboundFunction;
import org.apache.spark.sql.connector.expressions.Transform;
import org.apache.spark.sql.delta.DeltaLog;
import org.apache.spark.sql.types.StructType;
import org.apache.spark.sql.util.CaseInsensitiveStringMap;

/**
 * Schemas and tables as folders: what is there, where a new one goes, and what must not go away.
 *
 * <p>A schema is a folder below the root, a table a folder below that with a Delta log. Names are found as they are
 * written, else without regard to case, as Unity Catalog does. All access goes through Hadoop's file systems.
 */
final class LakeFolder implements TableCatalog, SupportsNamespaces, FunctionCatalog {
  private static final Pattern NAME = Pattern.compile("[^\\x00-\\x20/\\x7f`.%]+");
  private static final Pattern COMMIT = Pattern.compile("\\d{20}\\.(json|checkpoint\\..*)");

  private final String catalog;
  private final Path root;
  private final List<String> declared = new ArrayList<>();
  private final Supplier<Configuration> hadoop;

  LakeFolder(String catalog, Path root, String[] declared, Supplier<Configuration> hadoop) {
    this.catalog = catalog;
    this.root = root;
    this.hadoop = hadoop;
    for (String schema : declared) {
      if (!schema.isBlank()) {
        this.declared.add(schema.strip());
      }
    }
  }

  /** The folder of a table that is there, or null. */
  Path find(Identifier table) {
    String schema = table.namespace().length == 1 ? schema(table.namespace()[0]) : null;
    if (schema == null || !NAME.matcher(table.name()).matches()) {
      return null;
    }
    return asking(files -> {
      Path folder = new Path(root, schema);
      Path path = new Path(folder, table.name());
      if (isTable(files, path)) {
        return path;
      }
      for (String name : folders(files, folder)) {
        if (name.equalsIgnoreCase(table.name()) && isTable(files, new Path(folder, name))) {
          return new Path(folder, name);
        }
      }
      return null;
    });
  }

  /** The folder of a table that is not there yet. */
  Path place(Identifier table) {
    String schema = table.namespace().length == 1 ? schema(table.namespace()[0]) : null;
    if (schema == null) {
      throw unchecked(new NoSuchNamespaceException(table.namespace()));
    }
    return new Path(new Path(root, schema), checked(table.name()));
  }

  static UnsupportedOperationException refused(String what, String on, String why) {
    String code = "TELEMATICS_" + what.replace(' ', '_') + "_REFUSED";
    return new UnsupportedOperationException(code + ": " + what + " on " + on + " is refused: " + why);
  }

  /** Spark's own exceptions are checked ones, and Delta's methods declare none. */
  @SuppressWarnings("unchecked")
  static <E extends Throwable> RuntimeException unchecked(Throwable error) throws E {
    throw (E) error;
  }

  @Override
  public void initialize(String name, CaseInsensitiveStringMap options) {}

  @Override
  public String name() {
    return catalog;
  }

  @Override
  public Identifier[] listTables(String[] namespace) throws NoSuchNamespaceException {
    String schema = known(namespace);
    return asking(files -> {
      List<Identifier> tables = new ArrayList<>();
      Path folder = new Path(root, schema);
      for (String name : folders(files, folder)) {
        if (isTable(files, new Path(folder, name))) {
          tables.add(Identifier.of(namespace, name));
        }
      }
      return tables.toArray(Identifier[]::new);
    });
  }

  @Override
  public boolean tableExists(Identifier table) {
    return find(table) != null;
  }

  @Override
  public Table loadTable(Identifier table) throws NoSuchTableException {
    throw new NoSuchTableException(table);
  }

  @Override
  @SuppressWarnings("deprecation")
  public Table createTable(Identifier table, StructType schema, Transform[] parts, Map<String, String> properties) {
    throw refused("CREATE TABLE", table.toString(), "it is not Delta.");
  }

  @Override
  public Table alterTable(Identifier table, TableChange... changes) {
    throw refused("ALTER TABLE", table.toString(), "it is not Delta.");
  }

  /** Deletes the folder for good, as a managed table's is. */
  @Override
  public boolean dropTable(Identifier table) {
    Path path = find(table);
    if (path == null) {
      return false;
    }
    return asking(files -> {
      // Gone at once for every reader, whenever this is killed; the loader names what it drops the same way.
      String hidden = "." + path.getName() + "." + UUID.randomUUID().toString().replace("-", "") + ".dropped";
      Path aside = new Path(path.getParent(), hidden);
      boolean moved = files.rename(path, aside);
      DeltaLog.invalidateCache(SparkSession.active(), path);
      return moved && files.delete(aside, true);
    });
  }

  @Override
  public void renameTable(Identifier from, Identifier to) {
    throw refused(
        "RENAME TABLE", from.toString(), "a table is where its name says. CREATE TABLE … AS SELECT copies it instead.");
  }

  @Override
  public String[][] listNamespaces() {
    return asking(files -> {
      TreeSet<String> names = new TreeSet<>(declared);
      names.addAll(folders(files, root));
      return names.stream().map(name -> new String[] {name}).toArray(String[][]::new);
    });
  }

  @Override
  public String[][] listNamespaces(String[] namespace) throws NoSuchNamespaceException {
    if (namespace.length == 0) {
      return listNamespaces();
    }
    known(namespace);
    return new String[0][];
  }

  @Override
  public boolean namespaceExists(String[] namespace) {
    return namespace.length == 1 && schema(namespace[0]) != null;
  }

  @Override
  public Map<String, String> loadNamespaceMetadata(String[] namespace) throws NoSuchNamespaceException {
    return Map.of(SupportsNamespaces.PROP_LOCATION, new Path(root, known(namespace)).toString());
  }

  @Override
  public void createNamespace(String[] namespace, Map<String, String> properties)
      throws NamespaceAlreadyExistsException {
    if (namespaceExists(namespace)) {
      throw new NamespaceAlreadyExistsException(namespace);
    }
    String name = String.join(".", namespace);
    if (properties.containsKey(SupportsNamespaces.PROP_LOCATION)) {
      throw refused("LOCATION", name, "a schema of " + catalog + " is where its name says. Leave LOCATION out.");
    }
    asking(files -> files.mkdirs(new Path(root, checked(name))));
  }

  @Override
  public void alterNamespace(String[] namespace, NamespaceChange... changes) {
    throw refused("ALTER SCHEMA", String.join(".", namespace), "a schema is a folder, and nothing else.");
  }

  @Override
  public boolean dropNamespace(String[] namespace, boolean cascade) {
    throw refused(
        "DROP SCHEMA",
        catalog + "." + String.join(".", namespace),
        "it would delete the folder with every table in it. DROP TABLE drops one table; an empty folder does no harm.");
  }

  @Override
  public Identifier[] listFunctions(String[] namespace) {
    return new Identifier[0];
  }

  @Override
  public UnboundFunction loadFunction(Identifier function) throws NoSuchFunctionException {
    throw new NoSuchFunctionException(function);
  }

  private String known(String[] namespace) throws NoSuchNamespaceException {
    String schema = namespace.length == 1 ? schema(namespace[0]) : null;
    if (schema == null) {
      throw new NoSuchNamespaceException(namespace);
    }
    return schema;
  }

  /** A schema's name as its folder has it, or null if there is no such schema. */
  private String schema(String name) {
    if (!NAME.matcher(name).matches()) {
      return null;
    }
    return asking(files -> {
      if (declared.contains(name) || isFolder(files, new Path(root, name))) {
        return name;
      }
      List<String> names = new ArrayList<>(declared);
      names.addAll(folders(files, root));
      return names.stream().filter(name::equalsIgnoreCase).findFirst().orElse(null);
    });
  }

  private String checked(String name) {
    if (!NAME.matcher(name).matches()) {
      throw new IllegalArgumentException(
          "`" + name + "` is no name of a schema or table in " + catalog
              + ": names hold no space, dot, slash, backtick, percent or control character.");
    }
    return name;
  }

  private boolean isTable(FileSystem files, Path path) throws IOException {
    Path log = new Path(path, "_delta_log");
    if (files.exists(new Path(log, "00000000000000000000.json")) || files.exists(new Path(log, "_last_checkpoint"))) {
      return true;
    }
    // Old entries go away with time; a log without any is that of a writer that was killed at its first commit.
    for (FileStatus entry : entries(files, log)) {
      if (COMMIT.matcher(entry.getPath().getName()).matches()) {
        return true;
      }
    }
    return false;
  }

  private static boolean isFolder(FileSystem files, Path path) throws IOException {
    try {
      return files.getFileStatus(path).isDirectory();
    } catch (FileNotFoundException missing) {
      return false;
    }
  }

  /** Names of the folders in a folder, in order; hidden ones are no schemas and no tables. */
  private static List<String> folders(FileSystem files, Path folder) throws IOException {
    List<String> names = new ArrayList<>();
    for (FileStatus entry : entries(files, folder)) {
      String name = entry.getPath().getName();
      if (entry.isDirectory() && NAME.matcher(name).matches()) {
        names.add(name);
      }
    }
    Collections.sort(names);
    return names;
  }

  private static FileStatus[] entries(FileSystem files, Path folder) throws IOException {
    try {
      return files.listStatus(folder);
    } catch (FileNotFoundException missing) {
      return new FileStatus[0];
    }
  }

  private interface Question<T> {
    T ask(FileSystem files) throws IOException;
  }

  private <T> T asking(Question<T> question) {
    try {
      return question.ask(root.getFileSystem(hadoop.get()));
    } catch (IOException error) {
      throw new UncheckedIOException("The tables of " + catalog + " can't be reached at " + root + ": "
          + error.getMessage(), error);
    }
  }
}
