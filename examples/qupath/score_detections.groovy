/*
 * QuPath: send the detections of the open image to classify.py and take the scores back.
 *
 * Each detection gets the measurement "probability of …" and the class of the model; everything else
 * about it stays. Fill in the three paths, open an image with detections, run. In headless QuPath:
 *
 *   QuPath script score_detections.groovy --image=slide.svs --args=PYTHON --args=CHECKOUT --args=MODEL
 */
import groovy.json.JsonSlurper
import java.nio.file.Files
import java.nio.file.Paths

def python = '/path/to/.venv/bin/python'   // Windows: 'C:\\path\\to\\.venv\\Scripts\\python.exe'
def checkout = '/path/to/mitfig'
def model = '/path/to/model.onnx'
if (binding.hasVariable('args') && args && args.size() == 3)
    (python, checkout, model) = args as List

def server = getCurrentServer()
def slide = Paths.get(server.getURIs().find())
def detections = getDetectionObjects()
if (detections.isEmpty())
    throw new IllegalStateException('There are no detections on this image to be scored')

def folder = Files.createTempDirectory('mitfig')
def candidates = folder.resolve('candidates.geojson').toFile()
def scored = folder.resolve('scored.geojson').toFile()
try {
    exportObjectsToGeoJson(detections, candidates.getPath(), 'FEATURE_COLLECTION')

    def words = [python, new File(checkout, 'classify.py').getPath(), model,
                 '--slide', slide.toString(), '--candidates', candidates.getPath(),
                 '--out', scored.getPath()]
    def calibration = server.getPixelCalibration()
    if (calibration.hasPixelSizeMicrons())   // also one that was entered by hand
        words += ['--mpp', calibration.getAveragedPixelSizeMicrons().toString()]
    def builder = new ProcessBuilder(words*.toString()).redirectErrorStream(true)
    builder.environment().put('PYTHONUTF8', '1')
    def process = builder.start()
    process.outputStream.close()
    process.inputStream.eachLine('UTF-8') { println it }
    if (process.waitFor() != 0)
        throw new IllegalStateException('classify.py has failed; see the lines above')

    // By id: nothing is added twice, and what was not scored stays as it is.
    def features = [:]
    new JsonSlurper().parse(scored, 'UTF-8').features.each { features[it.id] = it.properties }
    int count = 0
    detections.each { detection ->
        def properties = features[detection.getID().toString()]
        def names = properties?.measurements?.keySet()?.findAll { it.startsWith('probability of ') }
        if (names) {
            names.each { name ->
                detection.getMeasurementList().put(name, properties.measurements[name] as double)
            }
            def (red, green, blue) = properties.classification.color
            int rgb = (255 << 24) | (red << 16) | (green << 8) | blue
            detection.setPathClass(getPathClass(properties.classification.name, rgb))
            count++
        }
    }
    fireHierarchyUpdate()
    println "${count} of ${detections.size()} detections have a score"
} finally {
    [candidates, scored]*.delete()
    Files.deleteIfExists(folder)
}
